"""The figure of a grid of ten arms, from values in memory and from a table that was read back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from nemo_upcycle.reporting.grid import arms_of, compare_arms
from nemo_upcycle.reporting.grid_figure import curves_figure
from tests.unit.reporting.drawn import end_of, faults_of
from tests.unit.reporting.grids import ARMS, STEP_TOKENS, laptop_evidence


LAST = 372 * STEP_TOKENS


@pytest.fixture(scope="module")
def in_memory() -> dict[str, Any]:
    evidence = laptop_evidence()
    return compare_arms(arms_of(evidence), evidence["described"])


@pytest.fixture(scope="module", params=["in memory", "read back"])
def values(request: pytest.FixtureRequest, in_memory: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = in_memory if request.param == "in memory" else json.loads(json.dumps(in_memory))
    return found


@pytest.fixture(scope="module")
def figure(values: dict[str, Any]) -> Any:
    return curves_figure(values)


def test_axes_of_tokens_are_numbers_that_end_with_the_longest_training(figure: Any) -> None:
    found = [axes for axes in figure.axes if axes.get_xlabel().startswith("tokens")]
    assert len(found) == 2
    for axes in found:
        assert end_of(axes) == pytest.approx(LAST, rel=0.06)
        low, high = axes.get_xlim()
        assert 2 <= len([tick for tick in axes.get_xticks() if low <= tick <= high]) <= 8


def test_nothing_is_cut_and_nothing_covers_the_data(figure: Any) -> None:
    assert faults_of(figure) == []


def test_ten_arms_are_told_apart_by_colour_and_line_and_each_has_its_marker(figure: Any) -> None:
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == list(ARMS)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(ARMS)
    assert len({line.get_marker() for line in lines}) == len(ARMS)


def test_an_arm_that_went_astray_does_not_press_the_others_together(in_memory: dict[str, Any]) -> None:
    astray = copy.deepcopy(in_memory)
    astray["arms"]["drop"]["bits_per_byte"]["value"] = 5.0
    limits = [curves_figure(values).axes[1].get_ylim() for values in (in_memory, astray)]
    assert limits[1][0] > limits[0][0] - 0.01
    assert limits[1][1] < limits[0][1] + 0.01


def test_a_difference_stands_in_the_row_of_its_label(figure: Any, values: dict[str, Any]) -> None:
    axes = figure.axes[-1]
    rows = {
        label.get_text().partition(" - ")[0]: place
        for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    drawn = {bar.lines[0].get_ydata()[0]: bar.lines[0].get_xdata()[0] for bar in axes.containers}
    assert {arm: drawn[row] for arm, row in rows.items()} == {
        arm: found["end"]["difference"] for arm, found in values["differences"].items()
    }
    for bar, found in zip(axes.containers, values["differences"].values(), strict=True):
        (ends,) = (segments.get_segments()[0][:, 0].tolist() for segments in bar.lines[2])
        assert ends == pytest.approx([found["end"]["low"], found["end"]["high"]])


def test_arms_that_cannot_be_compared_have_no_row(in_memory: dict[str, Any]) -> None:
    fewer = copy.deepcopy(in_memory)
    fewer["differences"]["drop"]["end"] = None
    assert len(curves_figure(fewer).axes[-1].get_yticks()) == len(ARMS) - 2
    for found in fewer["differences"].values():
        found["end"] = None
    figure = curves_figure(fewer)
    assert len(figure.axes) == 2
    assert faults_of(figure) == []
