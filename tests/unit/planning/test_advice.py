"""Advice decides where a law's bands are apart, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_upcycle.planning.advice import MOST_BEYOND, Option, Question
from nemo_upcycle.planning.hardware import known_gpu, known_shape
from nemo_upcycle.planning.law import Law, OptionLaw, published_law
from nemo_upcycle.planning.search import PlanRequest
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.spec import UpcycleSpec


E8T2 = UpcycleSpec(num_experts=8, top_k=2)
PARAMETERS = known_shape("smollm2_135m").total_params


def _question(**changes: object) -> Question:
    work = Workload(seq_length=2048, global_batch=512, routing="natural", gradients="bf16")
    request = PlanRequest(known_shape("smollm2_135m"), known_gpu("h100"), 8, work, tokens=2e9)
    return replace(Question(request, parent_tokens=1e10), **changes)


def _law(upcycled: float, error: float = 0.01, parameters: float = PARAMETERS) -> Law:
    """Return a law of two options whose losses differ by a constant, with two draws that scatter by 0.002."""

    def option(loss: float, error: float, parents: tuple[float, float]) -> OptionLaw:
        draws = [[0.0, 0.1, 0.1, loss + shift] for shift in (-0.002, 0.002)]
        coefficients = {"A": 0.0, "a": 0.1, "b": 0.1, "E": loss}
        sizes = (parameters, parameters)
        return OptionLaw("product", coefficients, parents, (1e9, 4e9), sizes, draws, error)

    parents = (5e9, 2e10)
    return Law("test", "here", {"dense": option(3.0, 0, parents), "upcycled_e8t2": option(upcycled, error, parents)})


@pytest.fixture(scope="module")
def options() -> list[Option]:
    return _question().options([E8T2])


@pytest.mark.parametrize(
    ("upcycled", "error", "best", "leans_to", "why"),
    [
        (2.9, 0.01, "upcycle e8t2", "upcycle e8t2", "the band of 'upcycle e8t2' is apart from all others"),
        (3.1, 0.01, "dense", "dense", "the band of 'dense' is apart from all others"),
        (2.9, 0.2, None, "upcycle e8t2", "the bands of 'upcycle e8t2' and 'dense' overlap"),
    ],
)
def test_it_decides_where_bands_are_apart(
    options: list[Option], upcycled: float, error: float, best: str | None, leans_to: str, why: str
) -> None:
    verdict = _question().parent.decide(_law(upcycled, error), options)
    assert (verdict.best, verdict.leans_to, verdict.why) == (best, leans_to, why)


@pytest.mark.parametrize(("ratio", "decides"), [(1.0, True), (MOST_BEYOND, True), (MOST_BEYOND + 0.1, False)])
def test_it_decides_up_to_a_distance_from_the_points(options: list[Option], ratio: float, decides: bool) -> None:
    question = _question(parent_tokens=2e10 * ratio)
    verdict = question.parent.decide(_law(2.9), options)
    assert verdict.leans_to == "upcycle e8t2"
    assert (verdict.best is not None) is decides
    if not decides:
        assert verdict.why == "the parent's tokens are 2.1 times beyond its range; it decides up to 2 times"


def test_an_option_from_nothing_that_lies_too_far_out_does_not_keep_it_from_deciding(options: list[Option]) -> None:
    law = _law(2.9)
    draws = [[0.0, 0.1, 2.0]] * 2
    far = OptionLaw("power", {"A": 0.0, "a": 0.1, "E": 2.0}, (0, 0), (1e12, 2e12), (PARAMETERS, PARAMETERS), draws)
    verdict = _question().parent.decide(Law("", "", {**law.options, "moe_from_nothing_e8t2": far}), options)
    assert verdict.best == "upcycle e8t2"
    assert verdict.why.endswith("; 'new e8t2' lies too far out to count")


def test_a_law_of_another_size_says_nothing_of_this_one(options: list[Option]) -> None:
    law = _law(2.9, parameters=PARAMETERS / 10)
    found = _question().parent.expect(law, options[1], options[0])
    assert found is not None
    assert found.difference is None
    verdict = _question().parent.decide(law, options)
    assert (verdict.best, verdict.leans_to) == (None, None)
    assert verdict.why.startswith("the parameters are 10.0 times beyond its range")


def test_the_published_law_leans_and_never_decides(options: list[Option]) -> None:
    verdict = _question().parent.decide(published_law(), options)
    assert (verdict.best, verdict.leans_to, verdict.why) == (None, "upcycle e8t2", "it has no intervals")
    far = _question(parent_tokens=1e14).parent.decide(published_law(), options)
    assert (far.best, far.leans_to) == (None, None)
    assert far.why.startswith("it has 'upcycle e8t2' above the parent that its training begins from")


def test_a_law_without_the_shape_says_so() -> None:
    granular = UpcycleSpec(num_experts=16, top_k=4, granularity=2)
    options = _question().options([granular])
    assert [option.name for option in options] == ["dense", "upcycle e16t4g2", "new e16t4g2"]
    verdict = _question().parent.decide(_law(2.9), options)
    assert (verdict.best, verdict.why) == (None, "it has no upcycled model of these shapes that fits")


def test_hours_give_each_option_what_it_reaches_in_them() -> None:
    dense, upcycled, new = _question(hours=10.0).options([E8T2])
    assert dense.plan.hours == pytest.approx(10)
    assert upcycled.plan.hours == pytest.approx(10)
    assert dense.tokens > 1.3 * upcycled.tokens
    assert new.tokens == upcycled.tokens
    rate = dense.plan.tokens_per_s_per_gpu * 8
    assert dense.tokens == pytest.approx(rate * 36_000)
