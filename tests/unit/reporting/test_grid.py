"""The table of a grid from the files that trainings leave; the expected numbers are computed in the comments."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.reporting.grid import compare_arms, read_arms
from nemo_upcycle.reporting.grid_table import write_table


BITS = {  # arm -> what its three documents take at the end, bits a byte, of the first seed
    "dense": (1.0, 1.1, 1.2),
    "dense_long": (0.8, 0.9, 1.0),
    "moe": (0.9, 1.0, 1.1),
}
STEPS = {"dense": 2, "dense_long": 8, "moe": 2}


def described() -> dict[str, Any]:
    cells = {
        f"{arm}-seed{seed}": {"arm": arm, "seed": seed, "steps": steps, "tokens_per_step": 100}
        for arm, steps in STEPS.items()
        for seed in (1, 2)
    }
    return {
        "about": "two families",
        "arms": dict.fromkeys(STEPS, "what it is"),
        "cells": cells,
        "references": {"moe": "dense"},
        "budgets": {"dense": ["dense", "dense_long"], "moe": ["moe", "moe"]},
    }


def evaluation(bits: tuple[float, ...]) -> dict[str, Any]:
    sources = ("law/1", "law/2", "web/1")
    items = [
        {"cluster": document, "scores": {"bits_per_byte": [-100 * math.log(2) * value, 100]}}
        for document, value in zip(sources, bits, strict=True)
    ]
    return {"items": {"heldout_perplexity": items}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for cell, about in described()["cells"].items():
        folder = tmp_path / cell
        (folder / "evaluation").mkdir(parents=True)
        shift = 0.01 * (about["seed"] - 1)
        for step, more in ((0, 1.0), (about["steps"], 0.0)):
            bits = tuple(value + more + shift for value in BITS[about["arm"]])
            (folder / f"evaluation/step={step}.json").write_text(json.dumps(evaluation(bits)))
        lines = [
            {"step": step, "loss": 1.0, "tokens": 100 * step, "seconds": 36.0}
            | (
                {"router": {"load_cv": [0.1 * step, 0.3 * step], "dropped": [0.0, None]}}
                if about["arm"] == "moe"
                else {}
            )
            for step in range(1, about["steps"] + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = {"flops_per_token": {"full": 1e6 * (2 if about["arm"] == "moe" else 1)}, "ranks": 2}
        (folder / "training.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.fixture
def values(run_dir: Path) -> dict[str, Any]:
    return compare_arms(read_arms(run_dir, described()), described())


def test_an_arm_has_its_tokens_flops_and_hours(values: dict[str, Any]) -> None:
    moe = values["arms"]["moe"]
    assert (moe["tokens"], moe["flops"]) == (200, 4e8)
    assert moe["rank_hours"] == pytest.approx(2 * 36 * 2 / 3600)
    assert moe["bits_per_byte"]["value"] == pytest.approx(1.005)  # 1.0 and 1.01
    assert moe["bits_per_byte"]["stderr"] == pytest.approx(0.005)
    assert moe["sources"]["law"]["value"] == pytest.approx(0.955)
    assert moe["routers"]["load_cv"] == {100: pytest.approx(0.2), 200: pytest.approx(0.4)}
    assert values["arms"]["dense"]["routers"] == {}


def test_arms_of_equal_tokens_are_ranked(values: dict[str, Any]) -> None:
    (ranking,) = values["rankings"]
    assert ranking["tokens"] == 200
    assert [entry["arm"] for entry in ranking["arms"]] == ["moe", "dense"]
    assert ranking["arms"][0]["to_best"] is None
    assert ranking["arms"][1]["to_best"]["difference"] == pytest.approx(0.1)
    assert ranking["arms"][1]["to_best"]["verdict"] == "worse"


def test_a_family_is_worth_tokens_of_the_first(values: dict[str, Any]) -> None:
    entry = values["budgets"]["moe"][0]
    # dense takes 1.105 bits after 200 tokens and 0.905 after 800; 1.005 is half of the way: 400
    assert entry["worth_tokens"] == pytest.approx(400)
    assert entry["worth_rank_hours"] == pytest.approx(400 / 800 * 8 * 36 * 2 / 3600)
    assert "worth_tokens" not in values["budgets"]["dense"][0]


def test_the_table_has_every_section_and_figure(run_dir: Path) -> None:
    text = write_table(run_dir, "mine", described()).read_text()
    for title in ("Arms", "Differences", "Ranking", "Budgets", "By source"):
        assert f"## {title}" in text
    assert "| moe | 200 | 1.0050 ± 0.0050 | 400 (2.00 times) |" in text
    for name in ("curves", "routers", "budgets"):
        assert (run_dir / f"table/{name}.png").stat().st_size > 10_000


def test_an_arm_beyond_all_budgets_is_worth_more_than_the_longest(run_dir: Path) -> None:
    for seed in (1, 2):
        path = run_dir / f"moe-seed{seed}/evaluation/step=2.json"
        path.write_text(json.dumps(evaluation((0.1, 0.1, 0.1))))
    assert "| more than 800 |" in write_table(run_dir, "mine", described()).read_text()


def test_an_arm_without_a_score_at_its_end_is_named(run_dir: Path) -> None:
    (run_dir / "moe-seed1/evaluation/step=2.json").unlink()
    text = write_table(run_dir, "mine", described()).read_text()
    assert "Not scored at the end, and left out: moe of seed 1." in text
    (run_dir / "moe-seed2/evaluation/step=2.json").unlink()
    with pytest.raises(UpcycleError, match="arm moe: got no score at its last step"):
        write_table(run_dir, "mine", described())
