"""The law of what pays: its bands, and that benchmarks/law_fit.py finds what made the points."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.law_fit import ALIKE, Point, fit_law, held_out_differences, read_points
from benchmarks.upcycling_law import law_yaml
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.planning.law import Law, OptionLaw, law_of


PARENTS, TOKENS = (2.5e6, 5e6, 1e7, 2e7), (5e5, 1e6, 2e6, 4e6)
INTERACTION = {"A": 300.0, "a": 0.28, "b": 0.24, "c": 0.012, "E": 1.4}
GRID = Path(__file__).parents[3] / "docs/results/budget/points.csv"


def _interaction(parent: float, tokens: float) -> float:
    law = INTERACTION
    return law["A"] * parent ** -law["a"] * tokens ** (-law["b"] + law["c"] * math.log(parent)) + law["E"]


def _dense(parent: float, tokens: float) -> float:
    return 40 * (parent + tokens) ** -0.22 + 1.5


def _additive(parent: float, tokens: float) -> float:
    return 30 * parent**-0.2 + 10 * tokens**-0.25 + 1.4


def _points(upcycled: Callable[[float, float], float], noise: float = 0.003) -> list[Point]:
    """Make trainings of three seeds; what a seed does to a parent's trainings, it does to dense and MoE."""
    random = np.random.default_rng(0)
    points = []
    for parent in PARENTS:
        for tokens in TOKENS:
            for seed in (1, 2, 3):
                shared, *own = noise * random.normal(size=3)
                dense, moe = _dense(parent, tokens), upcycled(parent, tokens)
                points.append(Point("dense", parent, tokens, 850_000, seed, dense + shared + own[0] / 3))
                points.append(Point("upcycled_e8t2", parent, tokens, 4e6, seed, moe + shared + own[1] / 3))
    return points


@pytest.fixture(scope="module")
def law() -> Law:
    return fit_law(_points(_interaction), "synthetic", "here", draws=20)


def test_a_fit_finds_the_form_and_the_coefficients_that_made_the_points(law: Law) -> None:
    option = law.options["upcycled_e8t2"]
    assert option.form == "interaction"
    for name, value in INTERACTION.items():
        low, high = option.intervals[name]
        assert low < value < high, name
    assert law.options["dense"].form == "sum"
    assert option.parent_tokens == (2.5e6, 2e7)
    assert option.tokens == (5e5, 4e6)
    assert option.parameters == (850_000, 850_000)


def test_the_wrong_forms_lose_on_parents_that_were_left_out(law: Law) -> None:
    errors = law.options["upcycled_e8t2"].held_out
    assert errors["interaction"] < 0.3 * min(errors[form] for form in ("product", "additive", "sum"))
    additive = fit_law(_points(_additive, noise=0.001), "synthetic", "here", draws=1).options["upcycled_e8t2"]
    assert additive.form == "additive"
    assert additive.held_out["interaction"] > 2 * additive.held_out["additive"]


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


def test_forms_that_predict_as_well_are_kept_and_others_are_not(law: Law) -> None:
    for option in law.options.values():
        least = min(option.held_out.values())
        assert option.held_out[option.form] == least
        alike = {form for form, error in option.held_out.items() if error <= ALIKE * least}
        assert set(option.others) == alike - {option.form}


def test_an_option_from_nothing_with_too_few_lengths_is_left_out_and_said(law: Law) -> None:
    for counts in (1, 2):
        new = [
            Point("moe_from_nothing_e8t2", 0, tokens, 4e6, 1, 4 - 0.1 * math.log(tokens)) for tokens in TOKENS[:counts]
        ]
        found = fit_law([*_points(_interaction), *new], "synthetic", "here", draws=2)
        assert set(found.options) == set(law.options)
        assert found.left_out == {"moe_from_nothing_e8t2": f"{counts} of at least 3 numbers of tokens were trained"}
    assert law.left_out == {}


@pytest.mark.weekly
@pytest.mark.full
def test_resolved_predictions_for_parents_that_were_left_out_have_the_right_sign() -> None:
    def crossing(parent: float, tokens: float) -> float:
        """Better than dense for short parents, worse for long ones."""
        return _dense(parent, tokens) + 0.02 * math.log(parent / 7e6)

    found = held_out_differences(_points(crossing), draws=30)
    assert len(found) == 16
    resolved = [one for one in found if one.is_right is not None]
    assert {one.parent_tokens for one in resolved} >= {2.5e6, 2e7}
    assert all(one.is_right for one in resolved)
    same = held_out_differences(_points(_dense), draws=30)
    assert sum(one.is_right is not None for one in same) <= 2, "a tie is not resolved"


@pytest.mark.weekly
@pytest.mark.full
def test_the_published_grid_resolves_no_left_out_parent_with_the_wrong_sign() -> None:
    found = held_out_differences(read_points(GRID), draws=30)
    answers = [one.is_right for one in found if one.option == "upcycled_e8t2"]
    assert len(answers) == 8
    assert answers.count(True) >= 3
    assert answers.count(False) == 0


def test_a_law_is_the_same_after_its_file(law: Law) -> None:
    text = law_yaml(law, "grid")
    assert text.startswith("#")
    again = law_of(yaml.safe_load(text))
    point = ("upcycled_e8t2", 2e6, "dense", 3e6, 1e7)
    assert vars(again.difference(*point)) == pytest.approx(vars(law.difference(*point)), abs=1e-4)


def test_a_grid_without_enough_parents_or_without_dense_is_refused() -> None:
    few = [point for point in _points(_interaction) if point.parent_tokens < 1e7]
    with pytest.raises(UpcycleError, match=r"here: dense: got 2 parents x 4 numbers of tokens"):
        fit_law(few, "synthetic", "here")
    upcycled = [point for point in _points(_interaction) if point.option != "dense"]
    with pytest.raises(UpcycleError, match=r"grid here: got the options upcycled_e8t2, expected dense and moe"):
        fit_law(upcycled, "synthetic", "here")
    larger = Point("dense", 4e7, 5e5, 9e5, 1, 2.5)
    with pytest.raises(UpcycleError, match=r"grid here: got dense models of 850,000 and 900,000 parameters"):
        fit_law([*_points(_interaction), larger], "synthetic", "here")


def test_points_are_read_with_the_names_of_their_options(tmp_path: Path) -> None:
    head, *rows = GRID.read_text(encoding="utf-8").splitlines(keepends=True)
    points = read_points(GRID)
    assert len(points) == len(rows)
    assert {point.option for point in points} == {
        *("dense", "dense_from_nothing", "upcycled_e8t2", "moe_from_nothing_e8t2")
    }
    assert {point.parameters for point in points if point.option == "dense"} == {164_160}
    (tmp_path / "points.csv").write_text(head + rows[0] * 2)
    with pytest.raises(UpcycleError) as caught:
        read_points(tmp_path / "points.csv")
    assert caught.value.got == "two rows"
