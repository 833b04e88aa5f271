"""The figure of a grid of ten arms, from values in memory and from a table that was read back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from nemo_upcycle.reporting.grid import arms_of, compare_arms
from nemo_upcycle.reporting.grid_figure import MOST_SERIES, drawn_arms, grid_figure
from tests.unit.reporting.drawn import faults_of
from tests.unit.reporting.grids import ARMS, STEP_TOKENS, laptop_evidence


LAST = 372 * STEP_TOKENS


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """The values of the grid, read back."""
    evidence = laptop_evidence()
    compared = compare_arms(arms_of(evidence), evidence["described"])
    found: dict[str, Any] = json.loads(json.dumps(compared))
    assert found == compared
    return found


@pytest.fixture(scope="module")
def figure(values: dict[str, Any]) -> Any:
    return grid_figure(values)


def test_the_axis_of_tokens_is_numbers_that_end_with_the_longest_training(figure: Any) -> None:
    (axes,) = [axes for axes in figure.axes if axes.get_xlabel().startswith("tokens")]
    low, high = axes.get_xlim()
    assert high == pytest.approx(LAST, rel=0.06)
    assert 2 <= len([tick for tick in axes.get_xticks() if low <= tick <= high]) <= 8


def test_nothing_is_cut_and_nothing_covers_the_data(figure: Any) -> None:
    assert faults_of(figure) == []


def test_arms_are_told_apart_and_named_in_words(figure: Any) -> None:
    lines = figure.axes[-1].lines
    labels = [line.get_label() for line in lines]
    assert len(labels) == MOST_SERIES
    assert "granular shared" in labels
    assert "drop" not in labels  # above where the others begin, to the end
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == MOST_SERIES
    assert figure.axes[-1].get_title() == "mean over 3 seeds; 2 more in the table; cut above where most begin"


def test_an_arm_of_fewer_seeds_is_in_the_table_alone(values: dict[str, Any]) -> None:
    fewer = copy.deepcopy(values)
    fewer["arms"]["moe"]["seeds"] = [1]
    assert "moe" in drawn_arms(values)
    assert "moe" not in drawn_arms(fewer)


def test_the_title_says_what_an_interval_is(figure: Any) -> None:
    assert figure.axes[0].get_title() == (
        "95 % intervals over 40 documents and 3 seeds,\n9 of them at once; grey: the margin of ±0.002"
    )


def test_a_difference_stands_in_the_row_of_its_label(figure: Any, values: dict[str, Any]) -> None:
    axes = figure.axes[0]
    rows = {
        label.get_text().partition(" - ")[0].replace(" ", "_"): place
        for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    drawn = {bar.lines[0].get_ydata()[0]: bar.lines[0].get_xdata()[0] for bar in axes.containers}
    assert {arm: drawn[row] for arm, row in rows.items()} == {
        arm: found["end"]["difference"] for arm, found in values["differences"].items()
    }
    for bar, found in zip(axes.containers, values["differences"].values(), strict=True):
        (ends,) = (segments.get_segments()[0][:, 0].tolist() for segments in bar.lines[2])
        assert ends == pytest.approx([found["end"]["low"], found["end"]["high"]])


def test_arms_that_cannot_be_compared_have_no_row(values: dict[str, Any]) -> None:
    fewer = copy.deepcopy(values)
    fewer["differences"]["drop"]["end"] = None
    assert len(grid_figure(fewer).axes[0].get_yticks()) == len(ARMS) - 2
    for found in fewer["differences"].values():
        found["end"] = None
    figure = grid_figure(fewer)
    assert len(figure.axes) == 1
    assert faults_of(figure) == []
