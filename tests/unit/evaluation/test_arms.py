"""Arms of a grid compared; every expected number is computed by hand in the comment beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.arms import (
    better_from,
    difference_of_arms,
    mean_of_seeds,
    rank_arms,
    sums_after,
)
from nemo_upcycle.evaluation.heldout import bits_per_byte, by_source, document_sums


BIT = math.log(2)  # nats


def documents(*bits: float) -> dict[str, tuple[float, float]]:
    """Documents of 100 bytes each that take so many bits a byte."""
    return {f"document {number}": (-100 * BIT * value, 100) for number, value in enumerate(bits)}


def test_windows_are_added_up_to_documents() -> None:
    items = [
        {"cluster": "a", "scores": {"bits_per_byte": [-1.0, 10]}},
        {"cluster": "b", "scores": {"bits_per_byte": [-4.0, 20]}},
        {"cluster": "a", "scores": {"bits_per_byte": [-2.0, 5]}},
    ]
    assert document_sums({"items": {"text": items}}, "text") == {"a": (-3.0, 15), "b": (-4.0, 20)}
    with pytest.raises(UpcycleError, match="Did you mean 'text'"):
        document_sums({"items": {"text": items}}, "texts")


def test_each_source_has_its_own_bits_per_byte() -> None:
    # 100 bytes of 1 bit and 100 of 3: 2.0; without one 3.0, without the other 1.0: jackknife 1.0
    named = dict(zip(("law/a", "web/1", "law/b"), documents(1.0, 0.5, 3.0).values(), strict=True))
    assert by_source(named) == {
        "law": {"value": pytest.approx(2.0), "stderr": pytest.approx(1.0), "documents": 2},
        "web": {"value": pytest.approx(0.5), "stderr": None, "documents": 1},
    }


def test_ranked_arms_allow_for_all_pairs() -> None:
    """What is left of arms (1.1, 1.22, 1.3) and seeds (1.1, 1.3133): 0.0067, -0.0133, 0.0067 and their opposites.

    Their squares sum to 5.33e-4, over two degrees of freedom 2.67e-4: the error of a difference over two seeds is
    sqrt(2 * 2.67e-4 / 2) = 0.01633. Tukey's q(0.95; 3, 2) is 8.331, over the root of two 5.891.
    """
    bits = {"far": (1.2, 1.4), "best": (1.0, 1.2), "near": (1.1, 1.34)}
    arms = {name: {1: documents(one, one), 2: documents(two, two)} for name, (one, two) in bits.items()}
    best, near, far = rank_arms(arms)
    assert (best["arm"], near["arm"], far["arm"]) == ("best", "near", "far")
    assert best["to_best"] is None
    assert near["to_best"]["difference"] == pytest.approx(0.12)
    assert near["to_best"]["stderr"] == pytest.approx(0.01633, rel=1e-3)
    assert near["to_best"]["high"] - 0.12 == pytest.approx(5.891 * 0.01633, rel=1e-3)
    assert near["to_best"]["verdict"] == "worse"


def test_one_seed_is_ranked_by_documents_alone() -> None:
    best, other = rank_arms({"a": {1: documents(1.0, 1.2)}, "b": {1: documents(1.1, 1.5)}})
    # 0.1 and 0.3 of two documents: 0.2 +- 0.1, of one degree: q(0.95; 2, 1) / root of two is t = 12.71
    assert (best["arm"], other["to_best"]["verdict"]) == ("a", "not resolved")
    assert other["to_best"]["high"] - 0.2 == pytest.approx(12.71 * 0.1, rel=1e-3)


def test_between_two_points_documents_are_linear_in_the_logarithm_of_the_tokens() -> None:
    scores = {
        0: {1: documents(9.0, 9.0)},
        100: {1: documents(3.0, 2.0), 2: documents(3.0, 3.0)},
        400: {1: documents(1.0, 1.0)},
    }
    # 200 is half of the way from 100 to 400; seed 2 is not known at 400.
    assert list(sums_after(200, scores)) == [1]
    assert sums_after(200, scores)[1] == {name: pytest.approx(one) for name, one in documents(2.0, 1.5).items()}
    assert sums_after(400, scores) == scores[400]


def test_the_mean_of_seeds() -> None:
    # 1.0 and 1.2: mean 1.1, standard deviation 0.1414, over the root of 2: 0.1; t(0.975, 1) = 12.706
    found = mean_of_seeds({1: documents(0.9, 1.1), 2: documents(1.2, 1.2)})
    assert found == pytest.approx({"value": 1.1, "stderr": 0.1, "low": 1.1 - 1.2706, "high": 1.1 + 1.2706}, rel=1e-3)
    one = mean_of_seeds({1: documents(1.0)})
    assert one["value"] == pytest.approx(1.0)
    assert (one["stderr"], one["low"], one["high"]) == (None, None, None)
    assert bits_per_byte(documents(1.0, 3.0)) == pytest.approx(2.0)


def test_documents_and_seeds_make_a_difference_uncertain() -> None:
    # Seed 1 gains 0.2 and 0.0 on its two documents, seed 2 0.4 and 0.2: 0.1 and 0.3, so 0.2 +- 0.1 over seeds.
    # Mean over seeds 0.3 and 0.1: without one document 0.1, without the other 0.3; jackknife 0.1.
    reference = {1: documents(1.0, 1.0), 2: documents(1.0, 1.0)}
    found = difference_of_arms({1: documents(0.8, 1.0), 2: documents(0.6, 0.8)}, reference)
    assert found["difference"] == pytest.approx(-0.2)
    assert [one["seed"] for one in found["seeds"]] == [1, 2]
    assert [one["difference"] for one in found["seeds"]] == pytest.approx([-0.1, -0.3])
    assert found["stderr_seeds"] == pytest.approx(0.1)
    assert found["stderr_documents"] == pytest.approx(0.1)
    assert found["stderr"] == pytest.approx(math.sqrt(0.02))
    # Two equal parts of one degree of freedom each have two: t(0.975, 2) = 4.3027.
    assert found["high"] - found["difference"] == pytest.approx(4.3027 * math.sqrt(0.02), rel=1e-4)
    assert found["verdict"] == "not resolved"


def test_documents_are_uncertain_by_the_mean_of_all_seeds() -> None:
    """Seed 1 gains 0.1 on every document, seed 2 0.1, 0.3 and 0.5: means of 0.1, 0.2 and 0.3."""
    reference = {1: documents(1.0, 1.0, 1.0), 2: documents(1.0, 1.0, 1.0)}
    arm = {1: documents(0.9, 0.9, 0.9), 2: documents(0.9, 0.7, 0.5)}
    # Without one document 0.25, 0.2, 0.15: the root of 2/3 of 0.005. Of seed 1 alone it would be 0, of seed 2 0.115.
    assert difference_of_arms(arm, reference)["stderr_documents"] == pytest.approx(0.05774, rel=1e-3)


@pytest.mark.parametrize(
    ("margin", "verdict"), [(0.0, "not resolved"), (0.002, "not resolved"), (0.0126, "not resolved"), (0.0128, "tie")]
)
def test_a_tie_lies_inside_the_margin_as_a_whole(margin: float, verdict: str) -> None:
    # 0.001 and -0.001 of two seeds, no spread over documents: 0.0 +- 0.001, t(0.975, 1) = 12.706
    reference = {seed: documents(1.0, 1.0) for seed in (1, 2)}
    arm = {1: documents(1.001, 1.001), 2: documents(0.999, 0.999)}
    found = difference_of_arms(arm, reference, margin)
    assert found["high"] == pytest.approx(0.012706, rel=1e-3)
    assert found["verdict"] == verdict


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "better"), (-0.1, "worse"), (0.0, "tie")])
def test_a_difference_beyond_its_interval_has_a_direction(gain: float, verdict: str) -> None:
    spread = [(0.001, -0.001, 0.002), (0.0, 0.001, -0.001), (0.001, 0.0, 0.0)]
    arm = {seed: documents(*(1.0 - gain + noise for noise in noises)) for seed, noises in enumerate(spread)}
    assert difference_of_arms(arm, {seed: documents(1.0, 1.0, 1.0) for seed in arm})["verdict"] == verdict


def test_what_rounding_makes_is_a_tie() -> None:
    """All documents and seeds agree on it: the interval alone would call it a difference."""
    found = difference_of_arms(
        {1: documents(1.0001, 1.0001), 2: documents(1.0001, 1.0001)},
        {1: documents(1.0, 1.0), 2: documents(1.0, 1.0)},
    )
    assert found["low"] > 0
    assert found["verdict"] == "tie"


def test_what_is_equal_to_the_last_bit_is_a_tie_whatever_the_margin() -> None:
    arm = {seed: documents(1.0 + seed / 10, 1.3) for seed in (1, 2, 3)}
    assert difference_of_arms(arm, arm, margin=0.0)["verdict"] == "tie"
    other = {seed: documents(1.05 + seed / 8, 1.3) for seed in (1, 2, 3)}
    assert rank_arms({"a": arm, "b": arm, "c": other})[1]["to_best"]["verdict"] == "tie"


def test_seeds_are_compared_with_their_own_kind() -> None:
    arm = {1: documents(1.0, 1.1), 3: documents(3.0, 3.1)}
    reference = {3: documents(3.0, 3.1), 2: documents(2.0, 2.1)}
    assert difference_of_arms(arm, reference)["seeds"] == [{"seed": 3, "difference": 0.0}]
    with pytest.raises(UpcycleError, match="no seed in common"):
        difference_of_arms({1: documents(1.0)}, {2: documents(1.0)})


def test_other_documents_are_refused() -> None:
    with pytest.raises(UpcycleError, match="train both in one grid"):
        difference_of_arms({1: documents(1.0, 1.0)}, {1: documents(1.0)})


def test_better_from_is_where_it_stays_better() -> None:
    def verdicts(*names: str) -> list[dict[str, Any]]:
        return [{"tokens": 100 * number, "verdict": name} for number, name in enumerate(names)]

    assert better_from(verdicts("tie", "better", "tie", "better", "better")) == 300
    assert better_from(verdicts("better", "better", "worse")) is None
    assert better_from(verdicts("better")) == 0
