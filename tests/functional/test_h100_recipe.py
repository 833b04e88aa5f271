"""The recipe for H100s trains, cut down and without Transformer Engine: the run that `tests/gpu` makes on a card."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.one_card import Sizes, prepare, train


SIZES = {"layers": 2, "hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "padded_vocab": 512}
SMALL = Sizes(**SIZES, sequence=64, batch=4, steps=4)


@pytest.mark.slow
@pytest.mark.full
def test_llama3_8b_e8t2_trains_on_one_rank(tmp_path: Path) -> None:
    lines = train(SMALL, *prepare(tmp_path, SMALL), tmp_path / "run", "bf16")
    losses = [line["loss"] for line in lines]
    assert len(losses) == SMALL.steps
    assert losses[-1] < losses[0]
    assert len(lines[0]["expert_load"]) == SMALL.layers
    assert (tmp_path / "run" / "receipt.json").is_file()
