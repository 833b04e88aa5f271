"""A grid that trains its parents, both from nothing and from them: stopped, reported, resumed, and its points."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks.grid_points import points_csv
from nemo_upcycle.reporting.grid_evidence import EVIDENCE, read_evidence
from nemo_upcycle.reporting.grid_table import write_grid
from nemo_upcycle.utils.files import MARKER
from tests.contract.test_ablate import SUITE
from tests.functional.command import NEMO, start
from tests.functional.tiny import write_texts
from tests.waiting import HANG_S, wait_until


pytestmark = [pytest.mark.slow, pytest.mark.full]
_SET = "data.global_batch_size: 4, data.micro_batch_size: 4, data.seq_length: 64, model.config.seq_length: 64"
GRID = f"""
data: texts/blend.yaml
parent: {{factory: "llama_1m_dense_ct(dense='untrained')", vocabulary: 300, set: {{model.config.seq_length: 64}}}}
evaluate: {{suite: suite.yaml, every_n_steps: 1000}}
seeds: [1]
defaults: {{{_SET}, optim.lr_scheduler.warmup_steps: 1}}
arms:
  dense_from_nothing: {{factory: "llama_1m_dense_ct(dense='parent')", parent: untrained, lengths: [2, 4]}}
  dense: {{factory: "llama_1m_dense_ct(dense='parent')", parent: dense_from_nothing-4, lengths: [3]}}
  moe: {{factory: "llama_1m_e8t2(dense='parent')", parent: dense_from_nothing-4, lengths: [3]}}
  moe_from_nothing:
    factory: llama_1m_e8t2(dense='parent')
    parent: untrained
    lengths: [4]
    spec: {{method: drop, drop_ratio: 1.0}}
references: {{moe: dense}}
"""
COMMAND = [NEMO, "upcycle", "ablate", "--grid", "grid.yaml", "dir=run", "--yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parents")
    write_texts(folder / "texts")
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "grid.yaml").write_text(GRID)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The grid, stopped by SIGINT when its parents are trained, reported, and finished by the same command."""
    first = start(COMMAND, folder)
    wait_until((folder / "run/dense-3-seed1" / MARKER).is_file, first, (folder / "console.txt").read_text)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(timeout=HANG_S) == 130
    shutil.copy(write_grid(folder / "run"), folder / "stopped.md")
    second = start(COMMAND, folder)
    assert second.wait(timeout=HANG_S) == 0, (folder / "console.txt").read_text()
    return folder / "run"


def test_what_is_finished_of_a_stopped_grid_is_reported(finished: Path) -> None:
    text = (finished.parent / "stopped.md").read_text()
    assert "Not finished, and left out: `moe-3-seed1`." in text
    console = (finished.parent / "console.txt").read_text()
    assert console.count("[dense_from_nothing-4-seed1] done in") == 1
    assert "[dense_from_nothing-4-seed1] done before, from the same inputs" in console


def _bits(cell: Path, step: int) -> float:
    found = json.loads((cell / f"evaluation/step={step}.json").read_text())
    return float(found["metrics"]["heldout_perplexity/bits_per_byte"]["value"])


def test_both_start_where_their_parent_ended_and_the_moe_from_nothing_does_not(finished: Path) -> None:
    parent = _bits(finished / "dense_from_nothing-4-seed1", 4)
    for cell in ("dense-3-seed1", "moe-3-seed1"):
        assert _bits(finished / cell, 0) == pytest.approx(parent, abs=2e-3)  # the checkpoint is of bfloat16
    untrained = _bits(finished / "dense_from_nothing-2-seed1", 0)
    assert untrained > parent
    assert _bits(finished / "moe_from_nothing-4-seed1", 0) == pytest.approx(untrained, rel=0.02)
    receipt = json.loads((finished / "moe_from_nothing-4-seed1/receipt.json").read_text())
    assert receipt["spec"]["drop_ratio"] == 1.0


def test_points_have_a_row_of_each_training_and_come_from_the_evidence_alone(finished: Path) -> None:
    points = list(csv.DictReader(points_csv(read_evidence(finished / "table" / EVIDENCE)).splitlines()))
    found = [(point["option"], int(point["parent_tokens"]) // 256, int(point["tokens"]) // 256) for point in points]
    assert sorted(found) == [
        ("dense", 4, 3),
        ("dense_from_nothing", 0, 2),
        ("dense_from_nothing", 0, 4),
        ("moe", 4, 3),
        ("moe_from_nothing", 0, 4),
    ]
    by_arm = {(point["arm"], point["steps"]): point for point in points}
    dense, moe = by_arm["dense", "3"], by_arm["moe", "3"]
    assert int(moe["total_parameters"]) > int(moe["active_parameters"]) > int(dense["total_parameters"])
    assert float(moe["training_flops"]) > float(dense["training_flops"]) > 0
    assert 1 < float(moe["loss"]) < 8  # nats a token of a vocabulary of 300
