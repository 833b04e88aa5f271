"""Muon, of Megatron's emerging optimizers: filled, trained, saved and resumed to the bit; experts beside all else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bridge.runs import VOCABULARY, differences, export, refusal, train_on_ranks
from tests.models import write_llama


SPEC = {"num_experts": 4, "top_k": 2}
#: It has no distributed optimizer of Megatron's.
MUON = {"optimizer": "muon", "use_distributed_optimizer": False}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "parent", tied=True, vocab_size=VOCABULARY)


def test_a_training_that_goes_on_has_the_bits_of_one_that_was_not_stopped(parent: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "ep": 2, "optimizer": MUON | {"bf16": False}}
    train_on_ranks(2, parent, tmp_path / "whole", SPEC, steps=4, **options)
    for steps in (2, 4):
        train_on_ranks(2, parent, tmp_path / "twice", SPEC, steps=steps, **options)
    whole, twice = (export(parent, tmp_path / run, tmp_path / f"{run}-hf") for run in ("whole", "twice"))
    assert not differences(whole, twice)
    assert differences(whole, export(parent, tmp_path / "twice/iter_0000002", tmp_path / "first-hf"))


def test_an_optimizer_in_bf16_of_weights_in_float32_is_refused(parent: Path, tmp_path: Path) -> None:
    """The bits of its states would be saved for no parameter, which Megatron finds at the first checkpoint."""
    said = refusal(parent, tmp_path / "run", SPEC, {f"optimizer.{name}": value for name, value in MUON.items()})
    assert "config.optimizer.bf16: got True, expected nothing: weights are in float32" in said
