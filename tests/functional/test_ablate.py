"""`nemo upcycle ablate` on a small grid: parent, arms, seeds, a stop, the table; and what a grid may get wrong."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from nemo_upcycle.reporting.grid_evidence import EVIDENCE
from nemo_upcycle.reporting.grid_table import write_grid
from nemo_upcycle.utils.files import MARKER
from tests.distributed.ranks import run_ranks
from tests.functional.command import start
from tests.functional.tiny import write_texts
from tests.functional.typed import type_commands
from tests.waiting import HANG_S, wait_until


pytestmark = pytest.mark.slow
_SET = "data.global_batch_size: 4, data.micro_batch_size: 4, data.seq_length: 64, model.config.seq_length: 64"
GRID = f"""
about: two arms
data: texts/blend.yaml
parent:
  factory: llama_1m_dense_ct(dense='untrained')
  vocabulary: 300
  set: {{trainer.max_steps: 4, {_SET}}}
evaluate: {{suite: suite.yaml, every_n_steps: 2}}
seeds: [1, 2]
defaults: {{trainer.max_steps: 4, {_SET}}}
arms:
  dense: {{factory: "llama_1m_dense_ct(dense='parent')"}}
  moe:
    factory: llama_1m_e8t2(dense='parent')
    about: copies
    spec: {{router_init: uniform}}
references: {{moe: dense}}
"""
SUITE = "tasks: {heldout_perplexity: [0]}\nheldout: {window_bytes: 60, windows: 12}\ndtype: float32\n"
CELLS = [f"{arm}-seed{seed}" for arm in ("dense", "moe") for seed in (1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablate")
    write_texts(folder / "texts")
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "grid.yaml").write_text(GRID)
    return folder


def _command(grid: str, *words: str) -> list[str]:
    nemo = str(Path(sys.executable).with_name("nemo"))
    return [nemo, "upcycle", "ablate", "--grid", grid, "dir=run", *words, "--yes"]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The grid, stopped by SIGINT once in its second cell, and finished by the same command."""
    first = start(_command("grid.yaml"), folder)
    wait_until((folder / "run/dense-seed1" / MARKER).is_file, first, (folder / "console.txt").read_text)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(timeout=HANG_S) == 130
    second = start(_command("grid.yaml", "at_once=2"), folder)
    assert second.wait(timeout=HANG_S) == 0, (folder / "console.txt").read_text()
    return folder / "run"


@pytest.mark.full
def test_every_cell_is_trained_once_and_scored_at_the_same_steps(finished: Path) -> None:
    for cell in CELLS:
        steps = sorted(path.stem for path in (finished / cell / "evaluation").glob("step=*.json"))
        assert steps == ["step=0", "step=2", "step=4"]
    console = (finished.parent / "console.txt").read_text()
    assert console.count("[dense-seed1] done in") == 1
    assert "[dense-seed1] done before, from the same inputs" in console


@pytest.mark.full
def test_copies_start_where_the_dense_arm_does(finished: Path) -> None:
    values = json.loads((finished / "table/table.json").read_text())
    start_of = {arm: found["start"]["value"] for arm, found in values["arms"].items()}
    assert start_of["moe"] == pytest.approx(start_of["dense"], abs=2e-4)
    assert values["differences"]["moe"]["start"]["verdict"] == "tie"


@pytest.mark.full
def test_seeds_change_the_order_of_the_data_and_the_router(finished: Path) -> None:
    def losses(cell: str) -> list[float]:
        lines = [json.loads(line) for line in (finished / cell / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    assert losses("dense-seed1") != losses("dense-seed2")
    receipts = [json.loads((finished / f"moe-seed{seed}/receipt.json").read_text()) for seed in (1, 2)]
    assert [receipt["spec"]["seed"] for receipt in receipts] == [1, 2]


@pytest.mark.full
def test_the_table_names_arms_and_differences(finished: Path) -> None:
    text = (finished / "table/table.md").read_text()
    assert "| moe - dense |" in text
    assert "2 seeds an arm" in text
    assert (finished / "table/curves.png").stat().st_size > 10_000


@pytest.mark.full
def test_the_evidence_alone_gives_the_same_table(finished: Path, tmp_path: Path) -> None:
    (tmp_path / EVIDENCE).write_bytes((finished / "table" / EVIDENCE).read_bytes())
    assert write_grid(tmp_path).read_text() == (finished / "table/table.md").read_text()
    assert (tmp_path / "table.json").read_bytes() == (finished / "table/table.json").read_bytes()


def test_a_grid_with_a_mistake_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    for name in ("suite.yaml", "texts"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "grid.yaml").write_text(GRID.replace("llama_1m_e8t2", "llama_1m_e8t3"))
    typed = ([_command("grid.yaml")[1:]], str(tmp_path), str(tmp_path))
    ((answer,),) = run_ranks(type_commands, 1, *typed, process_group=False)
    assert (answer.status, answer.written) == (2, []), answer.text
    assert "llama_1m_e8t2" in answer.text
