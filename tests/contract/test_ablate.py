"""`nemo upcycle ablate` on a small grid: arms, seeds, scores on the live model, the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.contract.trainers import IS_BRIDGE, losses, setting_name
from tests.functional.started import NEMO, Command
from tests.functional.tiny import write_finished_inputs


pytestmark = [pytest.mark.slow, pytest.mark.full, *([pytest.mark.weekly] if IS_BRIDGE else [])]
ARM = 'recipe: "tests.bridge.recipes:KIND", gpus: 2' if IS_BRIDGE else "factory: tests.contract.nemo_recipes.KIND"
GRID = f"""
about: two arms
dense: FOLDER/parent
data: FOLDER/blend
evaluate: {{suite: FOLDER/suite.yaml, every_n_steps: 2}}
seeds: [1, 2]
defaults: {{{setting_name("steps")}: 4}}
arms:
  dense: {{{ARM.replace("KIND", "dense_ct")}}}
  moe: {{{ARM.replace("KIND", "moe")}, about: copies, spec: {{router_init: uniform}}}}
references: {{moe: dense}}
"""
SUITE = "tasks: {heldout_perplexity: [0]}\nheldout: {window_bytes: 60, windows: 12}\ndtype: float32\n"
CELLS = [f"{arm}-seed{seed}" for arm in ("dense", "moe") for seed in (1, 2)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished grid, run two cells at a time."""
    folder = write_finished_inputs(tmp_path_factory.mktemp("ablate"))
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "grid.yaml").write_text(GRID.replace("FOLDER", str(folder)))
    words = ("upcycle", "ablate", "--grid", "grid.yaml", "dir=run", "at_once=2", "--yes")
    job = Command(folder / "console.txt", NEMO, *words, OMP_NUM_THREADS="2")
    assert job.wait() == 0, job.text()
    return folder / "run"


def test_every_cell_is_scored_at_the_same_steps(finished: Path) -> None:
    for cell in CELLS:
        steps = sorted(path.stem for path in (finished / cell / "evaluation").glob("step=*.json"))
        assert steps == ["step=0", "step=2", "step=4"]


def test_copies_start_where_the_dense_arm_does(finished: Path) -> None:
    values = json.loads((finished / "table/table.json").read_text())
    start_of = {arm: found["start"]["value"] for arm, found in values["arms"].items()}
    assert start_of["moe"] == pytest.approx(start_of["dense"], abs=2e-4)
    assert values["differences"]["moe"]["start"]["verdict"] == "tie"


def test_seeds_change_the_order_of_the_data_and_the_router(finished: Path) -> None:
    assert losses(finished / "dense-seed1") != losses(finished / "dense-seed2")
    receipts = [json.loads((finished / f"moe-seed{seed}/receipt.json").read_text()) for seed in (1, 2)]
    assert [(receipt["spec"]["seed"], receipt["ranks"]) for receipt in receipts] == [(1, 2), (2, 2)]
