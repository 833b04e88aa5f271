"""A grid that trains a parent from random weights, and starts other arms from this parent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.contract.test_ablate import SUITE
from tests.functional.started import NEMO, Command
from tests.functional.tiny import write_texts


# tests/contract/test_ablate.py has a smaller grid.
pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.weekly]
_SET = "data.global_batch_size: 4, data.micro_batch_size: 4, data.seq_length: 64, model.config.seq_length: 64"
GRID = f"""
data: texts/blend.yaml
parent: {{factory: "llama_1m_dense_ct(dense='untrained')", vocabulary: 300, set: {{model.config.seq_length: 64}}}}
evaluate: {{suite: suite.yaml, every_n_steps: 1000}}
seeds: [1]
defaults: {{{_SET}, optim.lr_scheduler.warmup_steps: 1}}
arms:
  dense_from_nothing: {{factory: "llama_1m_dense_ct(dense='parent')", parent: untrained, lengths: [4]}}
  dense: {{factory: "llama_1m_dense_ct(dense='parent')", parent: dense_from_nothing-4, lengths: [3]}}
  moe: {{factory: "llama_1m_e8t2(dense='parent')", parent: dense_from_nothing-4, lengths: [3]}}
  moe_from_nothing:
    factory: llama_1m_e8t2(dense='parent')
    parent: untrained
    lengths: [4]
    spec: {{method: drop, drop_ratio: 1.0}}
references: {{moe: dense}}
"""


def _bits(cell: Path, step: int) -> float:
    found = json.loads((cell / f"evaluation/step={step}.json").read_text())
    return float(found["metrics"]["heldout_perplexity/bits_per_byte"]["value"])


def test_both_arms_start_where_their_parent_ended(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "grid.yaml").write_text(GRID)
    words = ("upcycle", "ablate", "--grid", "grid.yaml", "dir=run", "--yes")
    job = Command(tmp_path / "console.txt", NEMO, *words, OMP_NUM_THREADS="2")
    assert job.wait() == 0, job.text()
    nothing, dense, moe, own = (
        tmp_path / f"run/{cell}-seed1" for cell in ("dense_from_nothing-4", "dense-3", "moe-3", "moe_from_nothing-4")
    )
    untrained, parent = (_bits(nothing, step) for step in (0, 4))
    assert untrained > parent
    for cell in (dense, moe):
        assert _bits(cell, 0) == pytest.approx(parent, abs=2e-3)  # the checkpoint is in bfloat16
    assert _bits(own, 0) == pytest.approx(untrained, rel=0.02)
    assert json.loads((own / "receipt.json").read_text())["spec"]["drop_ratio"] == 1.0
