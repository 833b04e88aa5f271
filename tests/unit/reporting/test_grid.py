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


#: Arm -> bits a byte of its three documents after the first step, of the first seed; 0.1 less when steps double.
BITS = {"dense": (1.0, 1.1, 1.2), "moe": (0.9, 1.0, 1.1), "st": (0.95, 1.05, 1.15)}
STEPS = {"dense": 8, "moe": 8, "st": 4}


def described() -> dict[str, Any]:
    cells = {
        f"{arm}-seed{seed}": {
            "arm": arm,
            "seed": seed,
            "steps": steps,
            "tokens_per_step": 100,
            "is_rate_constant": True,
        }
        for arm, steps in STEPS.items()
        for seed in (1, 2)
    }
    return {
        "about": "three arms",
        "arms": dict.fromkeys(STEPS, "what it is"),
        "cells": cells,
        "references": {"moe": "dense", "st": "moe"},
        "budgets": {"arms": ["dense", "moe"], "tokens": [200, 400]},
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
        for step in (step for step in (0, 1, 2, 4, 8) if step <= about["steps"]):
            gain = 0.1 * math.log2(step) if step else -1.0
            bits = tuple(value - gain + shift for value in BITS[about["arm"]])
            (folder / f"evaluation/step={step}.json").write_text(json.dumps(evaluation(bits)))
        lines = [
            {"step": step, "loss": 1.0, "tokens": 100 * step, "seconds": 36.0}
            | (
                {"router": {"load_cv": [0.1 * step, 0.3 * step], "dropped": [0.0, None]}}
                if about["arm"] != "dense"
                else {}
            )
            for step in range(1, about["steps"] + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = {"flops_per_token": {"full": 1e6 * (1 if about["arm"] == "dense" else 2)}, "ranks": 2}
        (folder / "training.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.fixture
def values(run_dir: Path) -> dict[str, Any]:
    return compare_arms(read_arms(run_dir, described()), described())


def test_an_arm_has_its_tokens_flops_and_hours(values: dict[str, Any]) -> None:
    moe = values["arms"]["moe"]
    assert (moe["tokens"], moe["flops"]) == (800, 16e8)
    assert moe["rank_hours"] == pytest.approx(8 * 36 * 2 / 3600)
    assert moe["bits_per_byte"]["value"] == pytest.approx(0.705)  # 1.0 - 0.3 and 0.01 more
    assert moe["bits_per_byte"]["stderr"] == pytest.approx(0.005)
    assert moe["sources"]["law"]["value"] == pytest.approx(0.655)
    assert moe["routers"]["load_cv"][200] == pytest.approx(0.4)
    assert values["arms"]["dense"]["routers"] == {}


def test_arms_are_compared_after_equal_tokens_and_with_equal_flops(values: dict[str, Any]) -> None:
    moe, st = values["differences"]["moe"], values["differences"]["st"]
    assert list(moe["along"]) == [0, 100, 200, 400, 800]
    assert moe["end"]["difference"] == pytest.approx(-0.1)
    assert moe["better_from"] == 0
    # 400 tokens at twice the FLOPs against 800: 0.1 better at equal tokens, and one doubling behind
    assert (moe["equal_flops"]["tokens"], moe["equal_flops"]["reference_tokens"]) == (400, 800)
    assert moe["equal_flops"]["flops_ratio"] == pytest.approx(1.0)
    assert moe["equal_flops"]["difference"] == pytest.approx(0.0, abs=1e-9)
    assert moe["equal_flops"]["verdict"] == "tie"
    assert st["end"]["difference"] == pytest.approx(0.05)  # at 400 tokens, where both are
    assert "equal_flops" not in st


def test_flops_are_equal_at_the_ends_alone_where_the_learning_rate_falls(run_dir: Path) -> None:
    falling = described()
    for about in falling["cells"].values():
        about["is_rate_constant"] = False
    values = compare_arms(read_arms(run_dir, falling), falling)
    assert "equal_flops" not in values["differences"]["moe"]


def test_arms_of_other_batches_are_compared_after_equal_tokens(run_dir: Path) -> None:
    """The MoE with steps of 200 tokens: its points after 1, 2 and 4 steps are those after 2, 4 and 8 of the parent."""
    other = described()
    for about in other["cells"].values():
        if about["arm"] == "moe":
            about["tokens_per_step"] = 200
    other |= {"references": {"moe": "dense"}, "budgets": {"arms": ["dense", "moe"], "tokens": [200, 400]}}
    values = compare_arms(read_arms(run_dir, other), other)
    found = values["differences"]["moe"]
    assert list(found["along"]) == [0, 200, 400, 800]
    assert found["end"]["difference"] == pytest.approx(0.0, abs=1e-9)  # 0.1 better, and a doubling behind
    assert values["budgets"]["moe"][0]["tokens"] == 200
    assert values["budgets"]["moe"][0]["value"] == pytest.approx(1.005)


def test_a_step_that_two_arms_scored_with_other_seeds_is_left_out(run_dir: Path) -> None:
    (run_dir / "moe-seed1/evaluation/step=2.json").unlink()
    (run_dir / "dense-seed2/evaluation/step=2.json").unlink()
    values = compare_arms(read_arms(run_dir, described()), described())
    assert list(values["differences"]["moe"]["along"]) == [0, 100, 400, 800]


def test_all_arms_that_came_so_far_are_ranked(values: dict[str, Any]) -> None:
    shorter, longer = values["rankings"]
    assert (shorter["tokens"], [entry["arm"] for entry in shorter["arms"]]) == (400, ["moe", "st", "dense"])
    assert (longer["tokens"], [entry["arm"] for entry in longer["arms"]]) == (800, ["moe", "dense"])
    assert shorter["arms"][0]["to_best"] is None
    assert shorter["arms"][2]["to_best"]["difference"] == pytest.approx(0.1)
    assert shorter["arms"][2]["to_best"]["verdict"] == "worse"


def test_a_gain_is_worth_tokens_of_the_first_arm(values: dict[str, Any]) -> None:
    short, long = values["budgets"]["moe"]
    # dense takes 1.105 bits after 100 tokens and 0.1 less each time they double; moe 0.905 after 200: dense after 400
    assert short["worth_tokens"] == pytest.approx(400)
    assert short["worth_rank_hours"] == pytest.approx(400 / 800 * 8 * 36 * 2 / 3600)
    assert long["worth_tokens"] == pytest.approx(800)
    assert "worth_tokens" not in values["budgets"]["dense"][0]


def test_the_table_has_every_section_and_figure(run_dir: Path) -> None:
    text = write_table(run_dir, "mine", described()).read_text()
    for title in ("Arms", "Differences", "Ranking", "Budgets", "By source"):
        assert f"## {title}" in text
    assert "| 200 | 1.0050 ± 0.0050 | 0.9050 ± 0.0050 | -0.1000 | 400 (2.00 times) |" in text
    for name in ("curves", "routers", "budgets"):
        assert (run_dir / f"table/{name}.png").stat().st_size > 10_000


def test_what_the_first_arm_never_reaches_is_worth_more_than_all_of_it(run_dir: Path) -> None:
    for seed in (1, 2):
        path = run_dir / f"moe-seed{seed}/evaluation/step=4.json"
        path.write_text(json.dumps(evaluation((0.1, 0.1, 0.1))))
    assert "| more than 800 |" in write_table(run_dir, "mine", described()).read_text()


def test_an_arm_without_a_score_at_its_end_is_named(run_dir: Path) -> None:
    (run_dir / "moe-seed1/evaluation/step=8.json").unlink()
    text = write_table(run_dir, "mine", described()).read_text()
    assert "Not scored at the end, and left out: moe of seed 1." in text
    (run_dir / "moe-seed2/evaluation/step=8.json").unlink()
    with pytest.raises(UpcycleError, match="arm moe: got no score at its last step"):
        write_table(run_dir, "mine", described())


def test_an_arm_without_a_score_at_its_start_is_named(run_dir: Path) -> None:
    for seed in (1, 2):
        (run_dir / f"moe-seed{seed}/evaluation/step=0.json").unlink()
    with pytest.raises(UpcycleError, match="arm moe: got no score at its first step"):
        write_table(run_dir, "mine", described())
