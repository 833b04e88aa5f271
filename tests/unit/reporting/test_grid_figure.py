"""The figure of the grid with ten arms in docs/results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.reporting.grid_figure import MOST_SERIES, drawn_arms, grid_figure
from tests.unit.reporting.drawn import faults_of


TABLE = Path(__file__).parents[3] / "docs/results/laptop/table.json"
VALUES: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figure() -> Any:
    return grid_figure(VALUES)


def test_nothing_is_cut_and_nothing_covers_the_data(figure: Any) -> None:
    assert faults_of(figure) == []


def test_arms_are_told_apart_and_named_in_words(figure: Any) -> None:
    lines = figure.axes[-1].lines
    labels = [line.get_label() for line in lines]
    assert "granular shared" in labels
    assert "drop" not in labels  # arm drop stays above the cut until the end
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == MOST_SERIES
    assert figure.axes[-1].get_title() == "mean over 3 seeds; 2 more in the table; cut above the start of most arms"


def test_an_arm_of_fewer_seeds_is_in_the_table_alone() -> None:
    fewer = copy.deepcopy(VALUES)
    fewer["arms"]["moe"]["seeds"] = [1]
    assert "moe" in drawn_arms(VALUES)
    assert "moe" not in drawn_arms(fewer)


def test_a_difference_is_drawn_in_its_own_row(figure: Any) -> None:
    axes, found = figure.axes[0], VALUES["differences"]
    assert axes.get_title().startswith(
        "95 % intervals over 32 documents and 3 seeds,\n9 intervals hold at once; grey: "
    )
    labels = [label.get_text().partition(" minus ")[0].replace(" ", "_") for label in axes.get_yticklabels()]
    assert labels == list(found)
    for place, (bar, difference) in enumerate(zip(axes.containers, found.values(), strict=True)):
        end = difference["end"]
        assert bar.lines[0].get_xydata().tolist() == [[end["difference"], axes.get_yticks()[place]]]
        (ends,) = (segments.get_segments()[0][:, 0].tolist() for segments in bar.lines[2])
        assert ends == pytest.approx([end["low"], end["high"]])


def test_arms_that_cannot_be_compared_have_no_row() -> None:
    fewer = copy.deepcopy(VALUES)
    fewer["differences"]["drop"]["end"] = None
    assert len(grid_figure(fewer).axes[0].get_yticks()) == len(VALUES["differences"]) - 1
    for found in fewer["differences"].values():
        found["end"] = None
    figure = grid_figure(fewer)
    assert len(figure.axes) == 1
    assert faults_of(figure) == []
