"""A grid of parents with several budgets: its table, its figure and points.csv. Numbers are computed in comments."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.reporting.grid import arms_of, compare_arms
from nemo_upcycle.reporting.grid_evidence import EVIDENCE, write_evidence
from nemo_upcycle.reporting.grid_parents import compare_parents, parents_figure, points_csv
from nemo_upcycle.reporting.grid_table import write_grid
from tests.unit.reporting.drawn import faults_of
from tests.unit.reporting.grids import AFTER, PARENTS, STEP_TOKENS, laptop_evidence, parents_evidence


@pytest.fixture(scope="module")
def evidence() -> dict[str, Any]:
    return parents_evidence()


@pytest.fixture(scope="module")
def rows(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    return compare_parents(arms_of(evidence), evidence["described"])


def test_every_upcycled_point_has_a_row(rows: list[dict[str, Any]]) -> None:
    pairs = [(row["parent_tokens"], row["tokens"]) for row in rows]
    assert pairs == [(before * STEP_TOKENS, after * STEP_TOKENS) for before in PARENTS for after in AFTER]


def test_two_moes_of_one_parent_have_rows_each_and_the_one_from_nothing_of_their_sizes(
    evidence: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """The second is a copy of the first, but that it has four experts, and nothing from nothing has."""
    old, new = "moe_610-", "moe4_610-"
    described = dict(evidence["described"]["cells"])
    others = {name: cell | {"arm": "moe4_610", "experts": 4} for name, cell in described.items() if old in name}
    described |= {name.replace(old, new): cell for name, cell in others.items()}
    cells = {name: evidence["cells"][name.replace(new, old)] for name in described}
    both = evidence | {"cells": cells, "described": evidence["described"] | {"cells": described}}
    found = compare_parents(arms_of(both), both["described"])
    assert [row for row in found if row["arm"] != "moe4_610"] == rows
    second = [row for row in found if row["arm"] == "moe4_610"]
    first = [row for row in rows if row["arm"] == "moe_610"]
    assert [row["equal_tokens"] for row in second] == [row["equal_tokens"] for row in first]
    assert [row["from_nothing"] for row in second] == [None] * 3
    figure = parents_figure(found, arms_of(both), both["described"])
    curves, gains = figure.axes
    labels = gains.get_legend_handles_labels()[1]
    assert [label.partition(", ")[2] for label in labels] == ["e4t2"] * 3 + ["e8t2"] * 3
    points = [container.lines[0].get_xydata() for container in gains.containers]
    assert [len(line) for line in points] == [1] * 3 + [len(PARENTS)] * 3
    for small, large in zip(points[:3], points[3:], strict=True):
        assert small[0, 1] == pytest.approx(large[1, 1]), "of the second parent, by as much"
    assert {line.get_label() for line in curves.lines} >= {"5M, upcycled e4t2", "5M, upcycled e8t2", "5M, trained on"}
    assert faults_of(figure) == []


def test_moes_of_one_shape_and_parent_have_a_line_of_gains_each(
    evidence: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Such as two init methods."""
    described = dict(evidence["described"]["cells"])
    described |= {f"{name}-b": cell | {"arm": "moe_610b"} for name, cell in described.items() if "moe_610-" in name}
    cells = {name: evidence["cells"][name.removesuffix("-b")] for name in described}
    both = evidence | {"cells": cells, "described": evidence["described"] | {"cells": described}}
    figure = parents_figure(compare_parents(arms_of(both), both["described"]), arms_of(both), both["described"])
    labels = figure.axes[1].get_legend_handles_labels()[1]
    assert [label for label in labels if label.endswith("(2)")] == [f"{label} (2)" for label in labels[:3]]
    assert not any("e8t2" in label for label in labels)


def test_gains_are_those_of_the_ends_of_whole_trainings(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["equal_tokens"]["difference"] == pytest.approx(-0.08 * 305 * STEP_TOKENS / row["parent_tokens"])
        assert row["equal_tokens"]["verdict"] == "better"


def test_equal_flops_and_minutes_are_read_between_the_ends_of_the_parent_trained_on(
    rows: list[dict[str, Any]],
) -> None:
    first = rows[0]  # 153 steps of the MoE at twice the FLOPs: 306 of the parent, which 305 are near enough
    dense_after_305 = 3.0 - 0.1 * math.log2((305 + 305) / 305)
    moe = 3.0 - 0.1 * math.log2((305 + 153) / 305) - 0.08
    assert first["equal_flops"]["difference"] == pytest.approx(moe - dense_after_305)
    # a step of the MoE takes three times as long: 459 steps of the parent, between 305 and 610
    share = math.log(459 / 305) / math.log(610 / 305)
    dense_after_459 = (1 - share) * dense_after_305 + share * (3.0 - 0.1 * math.log2((305 + 610) / 305))
    assert first["equal_time"]["difference"] == pytest.approx(moe - dense_after_459)
    last = rows[2]  # 610 steps: no training of the parent is as long as 1,220
    assert last["equal_flops"] is None


def test_the_moe_from_nothing_is_compared_at_all_tokens_and_its_need_is_read(rows: list[dict[str, Any]]) -> None:
    row = next(row for row in rows if row["parent_tokens"] == row["tokens"] == 610 * STEP_TOKENS)
    upcycled = 3.0 - 0.1 * 2 - 0.04  # 1,220 steps in all
    assert row["from_nothing"]["difference"] == pytest.approx(upcycled - (2.95 - 0.12 * 2), abs=1e-3)
    doublings = (2.95 - upcycled) / 0.12
    assert row["overtaken"] == pytest.approx(305 * STEP_TOKENS * 2**doublings, rel=1e-2)
    assert rows[-1]["from_nothing"] is None  # 3,051 steps in all


def test_points_have_what_a_law_is_fitted_to(evidence: dict[str, Any]) -> None:
    points = list(csv.DictReader(io.StringIO(points_csv(evidence, arms_of(evidence)))))
    options = [point["option"] for point in points]
    counts = {"dense": 24, "moe": 24, "dense_from_nothing": 8, "moe_from_nothing": 8}
    assert {option: options.count(option) for option in options} == counts
    point = next(point for point in points if point["arm"] == "moe_610" and point["steps"] == "153")
    assert (int(point["parent_tokens"]), int(point["tokens"])) == (610 * STEP_TOKENS, 153 * STEP_TOKENS)
    assert float(point["training_flops"]) == 153 * STEP_TOKENS * 2.0e6
    assert float(point["seconds"]) == pytest.approx(153 * 3.0)  # of the 3 to 30 s that a step took, the fastest ones
    bits = 3.0 - 0.1 * math.log2((610 + 153) / 305) - 0.04 + 0.002 * int(point["seed"])
    assert float(point["bits_per_byte"]) == pytest.approx(bits, abs=1e-4)
    assert float(point["loss"]) == pytest.approx(float(point["bits_per_byte"]) * 2.5 * math.log(2))
    assert 0 < float(point["loss_stderr"]) < 0.01


def test_a_grid_without_such_arms_has_neither_points_nor_figure() -> None:
    evidence = laptop_evidence()
    arms = arms_of(evidence)
    assert points_csv(evidence, arms) == ""
    assert compare_parents(arms, evidence["described"]) == []
    assert parents_figure([], arms, evidence["described"]) is None


def test_arms_are_ranked_with_those_of_their_parent_alone(evidence: dict[str, Any]) -> None:
    rankings = compare_arms(arms_of(evidence), evidence["described"])["rankings"]
    assert len(rankings) == 5
    for ranking in rankings:
        suffix = ranking["parent"].removeprefix("dense_from_nothing-")
        assert all(suffix in entry["arm"] or suffix == "untrained" for entry in ranking["arms"])


def test_a_page_is_rebuilt_from_the_evidence_and_says_what_is_missing(
    evidence: dict[str, Any], tmp_path: Path
) -> None:
    described = evidence["described"] | {"missing": ["moe_5m-610-seed3"]}
    write_evidence(tmp_path / EVIDENCE, evidence | {"described": described})
    text = write_grid(tmp_path).read_text()
    assert "Not finished, and left out: `moe_5m-610-seed3`." in text
    assert "| 5M | 1.25M |" in text
    assert "after 4,997,120 tokens from dense_from_nothing-610" in text
    assert len((tmp_path / "points.csv").read_text().splitlines()) == 1 + 64
    assert (tmp_path / "parents.png").stat().st_size > 20_000
