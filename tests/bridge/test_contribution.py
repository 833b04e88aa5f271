"""Upcycling in the form that Megatron-Bridge asks for, examples/bridge_contribution, against this package's."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.bridge_contribution import CONTRIBUTION
from nemo_upcycle import UpcycleSpec
from tests.bridge.runs import SPEC, run_config
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize("layout", [{"tp": 2, "ep": 2, "etp": 1}, {"pp": 2}], ids=str)
def test_upcycling_as_contributed_fills_a_model_with_the_bits_of_this_packages(
    dense: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    for differing in run_ranks(_differing, 2, dense, tmp_path / "run", layout):
        assert differing
        assert all(".router." in name for name in differing), differing


def _differing(dense: Path, folder: Path, layout: dict[str, int]) -> list[str]:
    """Return which parameters of this rank are not those that this package makes."""
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from nemo_upcycle.trainers.bridge.upcycling import upcycle_on_start

    contributed = runpy.run_path(str(CONTRIBUTION / "src/megatron/bridge/training/upcycling.py"))
    models = []
    for by_package in (True, False):
        config = run_config(dense, folder, UpcycleSpec(**SPEC), **layout)
        if by_package:
            upcycle_on_start(config, dense, UpcycleSpec(**SPEC))
        else:
            wanted = contributed["UpcyclingConfig"](hf_model_path=str(dense), **SPEC)
            wanted.setup(config.model)
            config.model.register_pre_wrap_hook(partial(contributed["upcycle"], wanted))
        config.model.finalize()
        if not models:
            config.model.initialize_model_parallel(seed=1)
        models.append(dict(config.model.provide_distributed_model(wrap_with_ddp=False)[0].named_parameters()))
    ours, theirs = models
    return [name for name in ours | theirs if not torch.equal(ours[name], theirs[name])]
