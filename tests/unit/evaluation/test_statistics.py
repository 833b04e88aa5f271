"""Intervals, verdicts and power. A comment beside each expected number derives it by hand."""

from __future__ import annotations

import math

import pytest

from nemo_upcycle.evaluation.statistics import (
    Spread,
    half_width,
    pooled,
    resolvable,
    seed_spread,
    seeds_to_resolve,
    spread_without_seeds,
    verdict,
)


MANY = 10_000_000


def test_each_error_has_the_quantile_of_its_own_degrees() -> None:
    # t(0.975) is 12.706 for one degree of freedom and 1.96 for many: sqrt(1.2706^2 + 0.392^2).
    assert half_width(Spread(0.1, 1), Spread(0.2, MANY), None) == pytest.approx(math.hypot(1.2706, 0.392), rel=1e-3)
    # two tests at once: t(0.9875) is 25.45 for one degree of freedom
    assert half_width(Spread(0.1, 1), tests=2) == pytest.approx(2.5452, rel=1e-3)


def test_spreads_are_pooled_by_their_degrees() -> None:
    found = pooled([Spread(1.0, 3), Spread(3.0, 1)])  # (3 * 1 + 1 * 9) / 4 = 3
    assert found is not None
    assert (found.value, found.degrees) == (pytest.approx(math.sqrt(3)), 4)
    assert pooled([]) is None


@pytest.mark.parametrize(
    ("values", "others", "expected"),
    [
        ([0.1], None, None),
        ([0.1], Spread(0.3, 8), Spread(0.3, 8)),
        ([0.0, 0.2], None, Spread(math.sqrt(0.02), 1)),
        ([0.0, 0.2], Spread(0.1, 8), Spread(0.1, 8)),  # twice the others' variance can be chance
        ([0.0, 0.8], Spread(0.1, 8), Spread(math.sqrt(0.32), 1)),  # 32 times the variance: F(1, 8) gives 0.0005
        ([0.0, 0.001, 0.002], Spread(0.1, 8), Spread(0.001, 2)),  # 1e-4 of the variance: F(2, 8) gives 0.0001
        ([0.0, 0.01, 0.02], Spread(0.1, 8), Spread(0.1, 8)),  # 1e-2 of the variance: F(2, 8) gives 0.01, too common
        ([0.0, 0.0], Spread(0.1, 8), Spread(0.0, 1)),
        ([0.1, 0.2, 0.3, 0.1, 0.3], Spread(0.1, 8), Spread(0.1, 4)),  # five seeds are enough for a spread of their own
    ],
)
def test_few_seeds_take_the_spread_of_all(values: list[float], others: Spread | None, expected: Spread | None) -> None:
    found = seed_spread(values, others)
    assert (found is None) == (expected is None)
    if found and expected:
        assert (found.value, found.degrees) == (pytest.approx(expected.value), expected.degrees)


def test_what_a_seed_does_to_all_models_is_taken_out() -> None:
    """Means of models (1.1, 1.22, 1.3) and of seeds (1.1, 1.3133) leave residuals +-0.0067, +-0.0133 and +-0.0067.

    Their squares sum to 5.33e-4. Divided by two degrees of freedom, this is 2.67e-4. The root of 2.67e-4 is
    0.01633.
    """
    found = spread_without_seeds({"far": {1: 1.2, 2: 1.4}, "best": {1: 1.0, 2: 1.2}, "near": {1: 1.1, 2: 1.34}})
    assert found is not None
    assert (found.value, found.degrees) == (pytest.approx(0.01633, rel=1e-3), 2)
    nothing_left = {"a": {1: 1.0, 2: 2.0}, "b": {1: 1.5, 2: 2.5}, "c": {2: 2.25}}
    assert spread_without_seeds(nothing_left) is None
    assert spread_without_seeds({"a": {1: 1.0}, "b": {2: 1.5}}) is None


def test_what_would_have_been_seen_takes_the_power_too() -> None:
    assert resolvable(Spread(1.0, MANY)) == pytest.approx(1.95996 + 0.84162, rel=1e-4)
    assert resolvable(Spread(3.0, MANY), Spread(4.0, MANY)) == pytest.approx(5 * 2.80159, rel=1e-4)


def test_seeds_to_resolve_are_the_fewest() -> None:
    documents, seeds = Spread(0.0003, 31), Spread(0.002, 20)
    needed = seeds_to_resolve(0.002, documents, seeds, tests=5)
    assert needed is not None
    assert resolvable(documents, seeds.of_mean(needed), tests=5) <= 0.002
    assert resolvable(documents, seeds.of_mean(needed - 1), tests=5) > 0.002
    assert seeds_to_resolve(0.002, Spread(0.001, 31), seeds) is None  # the documents' error alone hides the difference


@pytest.mark.parametrize(
    ("difference", "half", "could", "expected"),
    [
        (-0.01, 0.005, 0.007, "better"),
        (0.01, 0.005, 0.007, "worse"),
        (0.01, 0.011, 0.015, "not resolved"),
        (0.0005, 0.0014, 0.0019, "tie"),
        (0.0005, 0.0014, 0.0021, "not resolved"),  # a difference as large as the margin could be missed
        (0.0005, 0.0016, 0.0019, "not resolved"),
        (0.0001, 0.0, 0.0, "tie"),
        (0.003, 0.0, 0.0, "worse"),
    ],
)
def test_verdicts_follow_from_interval_and_power(difference: float, half: float, could: float, expected: str) -> None:
    assert verdict(difference, half, could, margin=0.002) == expected
