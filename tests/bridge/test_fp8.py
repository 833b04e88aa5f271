"""Bridge trains in FP8 without a GPU, and goes on from a checkpoint with the scales that it had."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from tests.bridge.runs import VOCABULARY, train
from tests.distributed.ranks import run_ranks
from tests.models import write_llama


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
SPEC: dict[str, Any] = {"num_experts": 4, "top_k": 2}
FP8 = {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}


def _train(dense: Path, folder: Path, options: dict[str, Any]) -> None:
    train(dense, folder, SPEC, lr=1e-3, **options)


def _weights(folder: Path, dense: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Train from a copy of the parent, and return the weights that come out."""
    from nemo_upcycle.cli.main import main

    parent = shutil.copytree(dense, folder / "parent")
    run_ranks(_train, 1, parent, folder / "run", options, process_group=False)
    export = ["export", str(folder / "run"), str(folder / "out"), "--dense", str(dense), "--dtype", "float32"]
    assert main(export) == 0
    with SafetensorsFolder(folder / "out") as weights:
        return {name: weights.read(name) for name in weights.names()}


def test_a_run_in_low_precision_resumes_to_the_bit(tmp_path: Path) -> None:
    dense = write_llama(tmp_path / "dense", tied=True, vocab_size=VOCABULARY)
    at_once = _weights(tmp_path / "once", dense, {"steps": 3, "model": FP8})
    in_two = _weights(tmp_path / "two", dense, {"steps": 2, "starts": 2, "model": FP8})
    without = _weights(tmp_path / "without", dense, {"steps": 3})
    assert all(torch.equal(at_once[name], in_two[name]) for name in at_once)
    assert not all(torch.equal(at_once[name], without[name]) for name in at_once)
