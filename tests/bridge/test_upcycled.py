"""One call makes a run of any configuration of Bridge's: parent, numbers of the paper, the layout that was there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.trainers import paper
from nemo_upcycle.utils.progress import show_messages
from tests.bridge.runs import SEQUENCE


def _recipe(folder: Path) -> Any:
    """Make a configuration as Bridge's recipes are: of another model, from random weights, in a layout of its own."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.recipes.common import _pretrain_common

    config = _pretrain_common()
    config.model = GPTModelProvider(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        vocab_size=1000,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        recompute_granularity="selective",
        rotary_base=5,
    )
    config.mixed_precision, config.train.micro_batch_size = None, 4
    config.dataset.seq_length = SEQUENCE
    config.checkpoint.save = str(folder)
    return config


@pytest.mark.parametrize("spec", [UpcycleSpec(num_experts=4, top_k=2), None], ids=["upcycled", "dense baseline"])
def test_layout_stays_and_model_rates_and_schedule_become_the_papers(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, spec: UpcycleSpec | None
) -> None:
    from nemo_upcycle.bridge import upcycled
    from nemo_upcycle.trainers.bridge.upcycling import hook_of

    given = _recipe(tmp_path / "run")
    show_messages().addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, show_messages().name):
        config = upcycled(given, dense=str(dense), spec=spec)
    show_messages().removeHandler(caplog.handler)
    model, hook = config.model, hook_of(config)
    assert hook is not None
    assert (hook.spec, hook.paths) == (spec, (dense,))
    assert (model.num_moe_experts, model.hidden_size, model.rotary_base) == (4 if spec else None, 64, 100000)
    assert (model.pipeline_model_parallel_size, model.recompute_granularity) == (2, "selective")
    assert (config.optimizer.lr, config.train.train_iters) == (paper.PEAK, paper.STEPS)
    assert (config.train.micro_batch_size, config.mixed_precision, model.params_dtype) == (4, None, torch.float32)
    assert config.checkpoint.dist_ckpt_optim_fully_reshardable
    assert "optimizer.lr: 0.0003 -> 3e-05" in caplog.text
    assert (given.optimizer.lr, given.model.num_layers, given.train.train_iters) == (3e-4, 2, 300000)


def test_data_that_are_not_finished_are_refused(dense: Path, tmp_path: Path) -> None:
    from nemo_upcycle.bridge import upcycled

    with pytest.raises(UpcycleError, match="data"):
        upcycled(_recipe(tmp_path / "run"), str(dense), UpcycleSpec(), tmp_path / "data")
