"""Comparison of a grid's arms. A comment beside each expected number derives it by hand."""

from __future__ import annotations

import math

import pytest

from nemo_upcycle.evaluation.grid_statistics import (
    ONE_SEED,
    better_from,
    difference_of_arms,
    judge,
    mean_of_seeds,
    pooled_spread,
    sums_after,
)
from nemo_upcycle.evaluation.heldout import TASK, bits_per_byte, document_sums
from nemo_upcycle.evaluation.statistics import Spread


BIT = math.log(2)  # nats per bit


def documents(*bits: float) -> dict[str, tuple[float, float]]:
    """Return documents of 100 bytes each, with these bits per byte."""
    return {f"document {number}": (-100 * BIT * value, 100) for number, value in enumerate(bits)}


def test_windows_are_added_up_to_documents() -> None:
    windows = (("a", [-1.0, 10]), ("b", [-4.0, 20]), ("a", [-2.0, 5]))
    items = [{"cluster": name, "scores": {"bits_per_byte": sums}} for name, sums in windows]
    assert document_sums({"items": {TASK: items}}) == {"a": (-3.0, 15), "b": (-4.0, 20)}


def test_documents_are_interpolated_in_the_logarithm_of_tokens() -> None:
    scores = {
        0: {1: documents(9.0, 9.0)},
        100: {1: documents(3.0, 2.0), 2: documents(3.0, 3.0)},
        400: {1: documents(1.0, 1.0)},
    }
    # On a logarithmic scale of tokens, 200 is halfway from 100 to 400. Seed 2 has no score at 400.
    assert list(sums_after(200, scores)) == [1]
    assert sums_after(200, scores)[1] == {name: pytest.approx(one) for name, one in documents(2.0, 1.5).items()}
    assert sums_after(400, scores) == scores[400]


def test_the_mean_of_seeds() -> None:
    # Two seeds score 1.0 and 1.2. The mean is 1.1 and the deviation 0.1414, so the standard error is
    # 0.1414 / sqrt(2) = 0.1. The quantile is t(0.975, 1) = 12.706.
    found = mean_of_seeds({1: documents(0.9, 1.1), 2: documents(1.2, 1.2)})
    assert found == pytest.approx({"value": 1.1, "low": 1.1 - 1.2706, "high": 1.1 + 1.2706}, rel=1e-3)
    assert mean_of_seeds({1: documents(1.0)})["low"] is None
    assert bits_per_byte(documents(1.0, 3.0)) == pytest.approx(2.0)


def test_documents_and_seeds_make_a_difference_uncertain() -> None:
    # Seed 1 gains 0.2 and 0.0 on the two documents, and seed 2 gains 0.4 and 0.2. The means of the seeds are 0.1 and
    # 0.3, which gives 0.2 +- 0.1 over seeds. The means of the documents are 0.3 and 0.1. Without one document, the
    # gain is 0.1, and without the other document it is 0.3, so the jackknife error is 0.1.
    reference = {1: documents(1.0, 1.0), 2: documents(1.0, 1.0)}
    found = judge(difference_of_arms({1: documents(0.8, 1.0), 2: documents(0.6, 0.8)}, reference), None)
    assert found["difference"] == pytest.approx(-0.2)
    assert [(one["seed"], pytest.approx(one["difference"])) for one in found["seeds"]] == [(1, -0.1), (2, -0.3)]
    assert (found["stderr_seeds"], found["stderr_documents"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (found["seed_degrees"], found["is_pooled"]) == (1, False)
    # Both errors have one degree of freedom: t(0.975, 1) = 12.706.
    assert found["high"] - found["difference"] == pytest.approx(12.706 * math.sqrt(0.02), rel=1e-4)
    assert found["verdict"] == "not resolved"


def test_documents_are_uncertain_by_the_mean_of_all_seeds() -> None:
    """Seed 1 gains 0.1 on every document, seed 2 gains 0.1, 0.3 and 0.5. The documents' means are 0.1, 0.2 and 0.3."""
    reference = {1: documents(1.0, 1.0, 1.0), 2: documents(1.0, 1.0, 1.0)}
    arm = {1: documents(0.9, 0.9, 0.9), 2: documents(0.9, 0.7, 0.5)}
    # Without one document, the mean is 0.25, 0.2 or 0.15, so the error is sqrt(2/3 * 0.005). Seed 1 alone would
    # give an error of 0, and seed 2 alone would give an error of 0.115.
    assert difference_of_arms(arm, reference)["stderr_documents"] == pytest.approx(0.05774, rel=1e-3)


def test_pools_the_spread_of_an_arm_over_families() -> None:
    # Family `near`: 1.0 and 1.2 against 1.1 and 1.36 leave four residuals of 0.015. The sum of their squares is
    # 4 * 0.015^2, with one degree of freedom. Family `far` leaves four residuals of 0.03.
    near = {"a": {1: documents(1.0), 2: documents(1.2)}, "b": {1: documents(1.1), 2: documents(1.36)}}
    far = {"a": {1: documents(2.0), 2: documents(2.2)}, "b": {1: documents(2.1), 2: documents(2.42)}}
    found = pooled_spread([near, far])
    assert found is not None
    assert (found.value, found.degrees) == (pytest.approx(math.sqrt((0.0009 + 0.0036) / 2)), 2)
    assert pooled_spread([near | {"again": near["a"]}, far]) == found  # identical scores count once
    assert pooled_spread([{"a": {1: documents(1.0)}, "b": {1: documents(1.1)}}]) is None


def test_few_seeds_are_judged_by_the_spread_of_all_arms() -> None:
    arm = {seed: documents(0.98, 0.98) for seed in (1, 2)}
    reference = {1: documents(1.0, 1.0), 2: documents(1.001, 1.001)}
    found = judge(difference_of_arms(arm, reference), Spread(0.002, 30))
    assert found["is_pooled"] is True
    assert found["stderr_seeds"] == pytest.approx(0.002)  # sqrt(2) for a difference, divided by sqrt(2) for two seeds
    assert found["verdict"] == "better"
    assert found["resolvable"] == pytest.approx((2.0423 + 0.8538) * 0.002, rel=1e-3)
    assert found["seeds_needed"] == 17  # (2.896 * 0.002828 / 0.002)^2 = 16.8


@pytest.mark.parametrize("others", [None, Spread(0.0001, 30)])
def test_one_seed_gets_no_verdict(others: Spread | None) -> None:
    found = judge(difference_of_arms({1: documents(0.5, 0.5)}, {1: documents(1.0, 1.0)}), others)
    assert found["verdict"] == ONE_SEED
    assert (found["low"] is None) == (others is None)


def test_bit_equal_arms_tie_with_one_seed() -> None:
    arm = {1: documents(1.0, 1.3)}
    found = judge(difference_of_arms(arm, arm), Spread(1.0, 3), margin=0.0)
    assert (found["verdict"], found["low"], found["high"]) == ("tie", 0.0, 0.0)


def test_seeds_are_compared_with_their_own_kind() -> None:
    arm = {1: documents(1.0, 1.1), 3: documents(3.0, 3.1)}
    reference = {3: documents(3.0, 3.1), 2: documents(2.0, 2.1)}
    assert difference_of_arms(arm, reference)["seeds"] == [{"seed": 3, "difference": 0.0}]


def test_better_from_is_where_it_stays_better() -> None:
    names = ("tie", "better", "tie", "better", "better", "worse")
    points = [{"tokens": 100 * number, "verdict": name} for number, name in enumerate(names)]
    assert better_from(points[:-1]) == 300
    assert better_from(points) is None
    assert better_from(points[3:5]) == 300
