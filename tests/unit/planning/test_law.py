"""The law of what pays: its bands, and that benchmarks/law_fit.py finds what made the points."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import ANY

import numpy as np
import pytest

from benchmarks.law_fit import Point, drawn_means, fit_law, held_out_error
from nemo_upcycle.planning.law import Law, OptionLaw


PARENTS, TOKENS = (2.5e6, 5e6, 1e7, 2e7), (5e5, 1e6, 2e6, 4e6)
INTERACTION = {"A": 300.0, "a": 0.28, "b": 0.24, "c": 0.012, "E": 1.4}


def _interaction(parent: float, tokens: float) -> float:
    law = INTERACTION
    return law["A"] * parent ** -law["a"] * tokens ** (-law["b"] + law["c"] * math.log(parent)) + law["E"]


def _dense(parent: float, tokens: float) -> float:
    return 40 * (parent + tokens) ** -0.22 + 1.5


def _points() -> list[Point]:
    """Make trainings of three seeds; what a seed does to a parent's trainings, it does to dense and MoE."""
    random = np.random.default_rng(0)
    points = []
    for parent in PARENTS:
        for tokens in TOKENS:
            for seed in (1, 2, 3):
                shared, *own = 0.003 * random.normal(size=3)
                dense, moe = _dense(parent, tokens), _interaction(parent, tokens)
                points.append(Point("dense", parent, tokens, 850_000, seed, dense + shared + own[0] / 3))
                points.append(Point("upcycled_e8t2", parent, tokens, 4e6, seed, moe + shared + own[1] / 3))
    return points


@pytest.fixture(scope="module")
def law() -> Law:
    too_few = [Point("moe_from_nothing_e8t2", 0, tokens, 4e6, 1, 4 - 0.1 * math.log(tokens)) for tokens in TOKENS[:2]]
    return fit_law([*_points(), *too_few], "synthetic", "here", draws=8)


@pytest.mark.full
def test_a_fit_finds_the_form_and_the_coefficients_that_made_the_points(law: Law) -> None:
    option = law.options["upcycled_e8t2"]
    assert option.form == "interaction"
    for name, value in INTERACTION.items():
        low, high = option.intervals[name]
        assert low < value < high, name
    assert law.options["dense"].form == "sum"
    errors = option.held_out
    assert errors["interaction"] < 0.9 * min(errors[form] for form in ("product", "additive", "sum"))
    assert law.left_out == {"moe_from_nothing_e8t2": ANY}
    ranges = (option.parent_tokens, option.tokens, option.parameters)
    assert ranges == ((2.5e6, 2e7), (5e5, 4e6), (850_000, 850_000))


def test_drawn_means_spread_as_far_as_seeds_do() -> None:
    # 1 and 3: a mean of 2 seeds spreads by sqrt(2) / sqrt(2) = 1; one that is drawn again by half of the variance
    seeds = {"dense": [Point("dense", 1.0, 1.0, 1.0, seed, loss) for seed, loss in ((1, 1.0), (2, 3.0))]}
    drawn = [drawn_means(seeds, number)["dense"][1.0, 1.0] for number in range(400)]
    assert np.std(drawn) == pytest.approx(1.0, rel=0.1)
    assert max(drawn) == pytest.approx(2 + math.sqrt(2))


def test_the_held_out_error_has_a_degree_of_freedom_less_than_parents() -> None:
    errors = {"dense": {(float(parent), 1.0): 0.1 for parent in (1, 2, 3, 4)}}
    assert held_out_error("dense", errors) == pytest.approx(2.3534 * 0.1, rel=1e-4)  # t(0.95, 3)


def test_bands_hold_the_true_differences_and_widen_beyond_the_points(law: Law) -> None:
    widths = []
    for parent, tokens in ((1e7, 2e6), (8e7, 1.6e7)):
        band = law.difference("upcycled_e8t2", tokens, "dense", tokens, parent)
        assert band.low is not None
        assert band.high is not None
        assert band.low < _interaction(parent, tokens) - _dense(parent, tokens) < band.high
        widths.append(band.high - band.low)
    assert widths[1] > 1.2 * widths[0]


def test_a_band_reaches_around_the_forms_that_are_as_good() -> None:
    chosen = {"A": 2.0, "a": 0.0, "b": 0.05, "E": 2.0}
    other = {"A": 0.0, "B": 2.0 * 2e6**0.03, "a": 0.0, "b": 0.08, "E": 2.0}  # the same after 2M tokens
    sizes = ((5e6, 2e7), (1e6, 4e6), (1.0, 1.0))
    dense = OptionLaw("product", chosen | {"A": 0.0}, *sizes, draws=[[0.0, 0.0, 0.05, 2.0]] * 2)
    alone = OptionLaw("product", chosen, *sizes, draws=[list(chosen.values())] * 2, error=0.001)
    both = replace(alone, others={"additive": other})

    def widths(tokens: float) -> tuple[float, float]:
        found = []
        for option in (alone, both):
            law = Law("", "", {"dense": dense, "upcycled_e8t2": option})
            band = law.difference("upcycled_e8t2", tokens, "dense", tokens, 1e7)
            assert band.value == pytest.approx(2.0 * tokens**-0.05)
            assert band.low is not None
            assert band.high is not None
            found.append(band.high - band.low)
        return found[0], found[1]

    assert widths(2e6) == pytest.approx((0.002, 0.002))
    assert widths(2e7) == pytest.approx((0.002, 0.002 + 2.0 * 2e7**-0.05 - other["B"] * 2e7**-0.08))
