"""`nemo upcycle ablate` in Megatron-Bridge: arms, seeds, scores on the live model, the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.evaluation.compare import compare_items
from nemo_upcycle.evaluation.run import evaluate
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.utils.files import read_json
from tests.functional.started import environment
from tests.functional.tiny import write_finished_inputs
from tests.waiting import HANG_S


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
GRID = """
about: two arms in Bridge
dense: {folder}/parent
data: {folder}/blend
evaluate: {{suite: {folder}/suite.yaml, every_n_steps: 2}}
seeds: [1]
defaults: {{train.train_iters: 4, validation.eval_iters: 0}}
arms:
  dense: {{recipe: "tests.bridge.recipes:tiny_dense_ct", gpus: 2}}
  moe: {{recipe: "tests.bridge.recipes:tiny", gpus: 2, spec: {{router_init: zero}}}}
references: {{moe: dense}}
"""
SUITE = "tasks: {heldout_perplexity: [0]}\nheldout: {window_bytes: 60, windows: 12}\ndtype: float32\n"


def _ablate(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    nemo = Path(sys.executable).with_name("nemo")
    command = [nemo, "upcycle", "ablate", "--grid", "grid.yaml", "dir=run", *words, "--yes"]
    root = str(Path(__file__).parents[2])
    variables = environment() | {"PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=variables, timeout=2 * HANG_S, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_finished_inputs(tmp_path_factory.mktemp("ablate"))
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "grid.yaml").write_text(GRID.format(folder=folder))
    done = _ablate(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_cell_is_scored_on_its_way_and_compared(folder: Path) -> None:
    for cell in ("dense-seed1", "moe-seed1"):
        steps = sorted(path.stem for path in (folder / "run" / cell / "evaluation").glob("step=*.json"))
        assert steps == ["step=0", "step=2", "step=4"]
    table = json.loads((folder / "run/table/table.json").read_text())
    start_of = {arm: found["start"]["value"] for arm, found in table["arms"].items()}
    assert start_of["moe"] == pytest.approx(start_of["dense"], rel=1e-5)
    assert read_json(folder / "run/moe-seed1/receipt.json")["spec"]["router_init"] == "zero"


def test_a_live_model_scores_what_its_export_does(folder: Path) -> None:
    cell = folder / "run/moe-seed1"
    checkpoint = newest_checkpoint(cell / "checkpoints")
    assert checkpoint is not None
    export_checkpoint(checkpoint, folder / "parent", folder / "hf", dtype=torch.float32)
    offline = evaluate(folder / "hf", folder / "run/suite/items", folder / "offline", name="trained", samples=False)
    live = read_json(cell / "evaluation/step=4.json")
    assert compare_items(offline, live)["max_relative_loglikelihood_difference"] < 2e-5


def test_a_mistake_names_the_arm(folder: Path) -> None:
    text = (folder / "grid.yaml").read_text()
    (folder / "grid.yaml").write_text(text.replace("router_init: zero", "router_int: zero"))
    done = _ablate(folder, "--dryrun")
    (folder / "grid.yaml").write_text(text)
    assert done.returncode == 2
    assert "arms.moe: spec: got" in done.stderr
