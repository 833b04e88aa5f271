"""Advice decides where a law's bands are apart, and nowhere else; a run's line says so with its command."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning import advice
from nemo_upcycle.planning.advice import MOST_BEYOND, DenseParent, TrainingBudget, advice_line, known_parent_tokens
from nemo_upcycle.planning.hardware import known_recipe, read_data
from nemo_upcycle.planning.law import Law, OptionLaw
from nemo_upcycle.planning.recipe_table import recipes
from nemo_upcycle.spec import UpcycleSpec


LLAMA = known_recipe("llama3_8b_e8t2")
ADDRESS = LLAMA.inputs["dense"]
PARENT = DenseParent(15e12, LLAMA.dense.total_params)
OPTIONS = [TrainingBudget("dense", "dense", 1e11), TrainingBudget("upcycle e8t2", "upcycled_e8t2", 1e11)]
NEW = TrainingBudget("new e8t2", "moe_from_nothing_e8t2", 1e11)


def a_law(upcycled: float, parameters: float = PARENT.parameters, error: float = 0.01) -> Law:
    """Make a law of parents of 8T to 20T tokens: the upcycled model differs by a constant, +-`error`."""

    def option(loss: float) -> OptionLaw:
        coefficients = {"A": 0.0, "a": 0.1, "b": 0.1, "E": loss}
        sizes = ((8e12, 2e13), (5e10, 2e11), (parameters, parameters))
        return OptionLaw("product", coefficients, *sizes, [[0.0, 0.1, 0.1, loss]] * 2, error=error)

    return Law("test", "here", {"dense": option(2.0), "upcycled_e8t2": option(2.0 + upcycled)})


DENSE_ALONE = Law("", "", {"dense": a_law(0).options["dense"]})


@pytest.mark.parametrize(
    ("law", "parent_tokens", "best", "why"),
    [
        (a_law(-0.05), 15e12, "upcycle e8t2", "is apart from all others"),
        (a_law(0.05), 15e12, "dense", "is apart from all others"),
        (a_law(-0.05, error=0.1), 15e12, None, "the bands of 'upcycle e8t2' and 'dense' overlap"),
        (a_law(-0.05), 2e13 * MOST_BEYOND, "upcycle e8t2", "is apart from all others"),
        (a_law(-0.05), 4.2e13, None, "the parent's tokens are 2.1 times beyond its range"),
        (a_law(-0.05, PARENT.parameters / 10), 15e12, None, "the parameters are 10.0 times beyond its range"),
        (DENSE_ALONE, 15e12, None, "it has no upcycled model of this shape that fits"),
    ],
)
def test_it_decides_where_bands_are_apart(law: Law, parent_tokens: float, best: str | None, why: str) -> None:
    decided, reason = PARENT._replace(tokens=parent_tokens).decide(law, OPTIONS)
    assert decided == best
    assert why in reason


def test_an_option_from_nothing_that_lies_too_far_out_does_not_keep_it_from_deciding() -> None:
    draws = [[0.0, 0.1, 2.0]] * 2
    sizes = ((0, 0), (1e14, 2e14), (PARENT.parameters, PARENT.parameters))
    far = OptionLaw("power", {"A": 0.0, "a": 0.1, "E": 2.0}, *sizes, draws)
    law = Law("", "", {**a_law(-0.05).options, NEW.key: far})
    best, why = PARENT.decide(law, [*OPTIONS, NEW])
    assert (best, why.partition("; ")[2]) == ("upcycle e8t2", "'new e8t2' lies too far out to count")
    assert PARENT.decide(law, [*OPTIONS, NEW._replace(fits=False)]) == PARENT.decide(a_law(-0.05), OPTIONS)


def test_a_law_that_has_an_upcycled_model_above_its_parent_does_not_hold() -> None:
    sizes = ((0, 0), (8e12, 2e13), (PARENT.parameters, PARENT.parameters))
    parent = OptionLaw("power", {"A": 0.0, "a": 0.1, "E": 1.9}, *sizes, [[0.0, 0.1, 1.9]] * 2)
    law = Law("", "", {**a_law(-0.05).options, "dense_from_nothing": parent})
    assert PARENT.decide(law, OPTIONS)[0] == "upcycle e8t2"
    best, why = PARENT._replace(tokens=3e13).decide(law, OPTIONS)
    assert (best, why.partition(" that its")[0]) == (None, "it has 'upcycle e8t2' above the parent")


def _line(law: Law | None, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    monkeypatch.setattr(advice, "fitted_law", lambda: law)
    given = {"address": ADDRESS, "trained_on": None, "arch": LLAMA.arch, "tokens": 1e11, "dense_tokens": 1e11}
    return advice_line(**(given | {"gpus": 512} | changes))


COMMAND = f"nemo-upcycle advise --model {ADDRESS} --trained-on 15T --tokens"


@pytest.mark.parametrize(
    ("law", "said"),
    [
        (a_law(-0.05), "upcycle e8t2, by the fitted law: -0.050 nats a token beside the parent trained on (90 % "),
        (a_law(0.005), "not resolved by the fitted law (the bands of 'dense' and 'upcycle e8t2' overlap)"),
        (a_law(-0.05, 1e9), "no fitted law applies (the parameters are 8.0 times beyond its range"),
        (None, "no fitted law applies (none was fitted yet). Costs"),
    ],
)
def test_a_line_says_what_the_fitted_law_decides(law: Law | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = _line(law, monkeypatch)
    assert line.startswith(f"e8t2 after 15T + 100B tokens: {said}")
    assert line.endswith(f"Costs and more: `{COMMAND} 100B --experts 8 --top-k 2 --gpus 512`")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (UpcycleSpec(num_experts=16, top_k=4, granularity=2), "it has no e16t4g2"),
        (UpcycleSpec(shared_experts=1, moe_layers="every-2"), "it has no e8t2 with shared experts in some layers"),
    ],
)
def test_a_shape_that_the_law_lacks_is_named(spec: UpcycleSpec, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = _line(a_law(-0.05), monkeypatch, arch=LLAMA.dense.upcycled(spec))
    assert f"no fitted law applies ({words}). Costs" in line
    assert ("--granularity 2" in line) is (spec.granularity == 2)


def test_a_baseline_of_more_tokens_counts_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    law = a_law(-0.05)
    power = {"A": 2.0, "a": 0.0, "b": 0.05, "E": 2.0}
    dense = replace(law.options["dense"], coefficients=power, draws=[list(power.values())] * 2)
    law = replace(law, options={**law.options, "dense": dense})
    same, more = (_line(law, monkeypatch, dense_tokens=tokens) for tokens in (1e11, 1.6e11))
    assert same.partition(" nats")[0] != more.partition(" nats")[0]


@pytest.mark.parametrize(
    ("changes", "what", "command"),
    [
        ({"address": "/my model"}, "what the parent was trained on; add trained_on=15T", "'/my model' --trained-on N"),
        ({"tokens": 0.0}, "how long it trains", f"{COMMAND} N --experts 8 --top-k 2 --gpus 512"),
        ({"arch": None, "tokens": 0.0, "gpus": None}, "before the parent is fetched", f"{COMMAND} N --gpus N"),
    ],
)
def test_what_is_not_known_is_said_with_the_command_that_answers(
    changes: dict[str, Any], what: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = _line(None, monkeypatch, **changes)
    assert line.startswith("not known")
    assert (what in line, command in line) == (True, True)


def test_tokens_are_the_users_or_those_of_a_published_parent() -> None:
    assert known_parent_tokens("/models/mine", None) is None
    assert known_parent_tokens(ADDRESS, None) == 15e12
    assert known_parent_tokens(ADDRESS, "300B") == 3e11
    with pytest.raises(SpecError) as caught:
        known_parent_tokens(ADDRESS, "many")
    assert caught.value.subject == "trained_on"
    assert all(known_parent_tokens(known_recipe(name).inputs["dense"], None) for name in recipes("nemo"))
    assert all(entry["source"] and entry["tokens"] > 1e11 for entry in read_data("parents.yaml").values())
