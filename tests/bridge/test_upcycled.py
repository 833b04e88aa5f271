"""One call turns any Bridge configuration into an upcycling run: parent and learning rates are set, layout is kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.trainers import paper
from nemo_upcycle.utils.progress import show_messages
from tests.bridge.runs import SEQUENCE, as_builder


def _recipe(folder: Path) -> Any:
    """Return a configuration in the style of Bridge's recipes: another model, random weights, its own layout."""
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

    given = _recipe(tmp_path / "run")
    show_messages().addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, show_messages().name):
        config = upcycled(given, dense=str(dense), spec=spec)
    show_messages().removeHandler(caplog.handler)
    model = config.model
    assert (config.spec, config.parents) == (spec, (str(dense),))
    assert (model.num_moe_experts, model.hidden_size, model.rotary_base) == (4 if spec else None, 64, 100000)
    assert (model.pipeline_model_parallel_size, model.recompute_granularity) == (2, "selective")
    assert (config.optimizer.lr, config.train.train_iters) == (paper.PEAK, paper.STEPS)
    assert (config.train.micro_batch_size, config.mixed_precision, model.params_dtype) == (4, None, torch.float32)
    assert config.checkpoint.dist_ckpt_optim_fully_reshardable
    assert "optimizer.lr=3e-05" in caplog.text
    assert (given.optimizer.lr, given.model.num_layers, given.train.train_iters) == (3e-4, 2, 300000)


@pytest.mark.parametrize("form", ["provider", "builder"])
def test_switched_off_kernels_stay_off(dense: Path, tmp_path: Path, form: str) -> None:
    from nemo_upcycle.bridge import with_upcycling

    given = _recipe(tmp_path / "run")
    given.model.cross_entropy_fusion_impl, given.model.apply_rope_fusion = "te", False
    given.model.bias_activation_fusion = given.model.persist_layer_norm = given.model.bias_dropout_fusion = False
    if form == "builder":
        given.model = as_builder(given.model)
    model = with_upcycling(given, dense, num_experts=4, top_k=2).model
    assert (model.cross_entropy_fusion_impl, model.apply_rope_fusion) == ("te", False)
    assert not any((model.bias_activation_fusion, model.persist_layer_norm, model.bias_dropout_fusion))
    assert hasattr(model, "transformer") == (form == "builder")


def test_the_printed_changes_can_be_applied_again(dense: Path, tmp_path: Path) -> None:
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from nemo_upcycle.bridge import upcycled
    from nemo_upcycle.trainers.bridge.changes import changed_settings
    from nemo_upcycle.trainers.bridge.node import UpcyclingConfig

    config = upcycled(_recipe(tmp_path / "run"), dense, UpcycleSpec(num_experts=4, top_k=2))
    again = UpcyclingConfig.of(_recipe(tmp_path / "run"))
    typed = [line for line in changed_settings(again, config) if not line.startswith("upcycling.")]
    assert {"model.num_moe_experts=4", "optimizer.lr=3e-05", "model.activation_func=silu"} <= set(typed)
    process_config_with_overrides(again, cli_overrides=typed)
    again.upcycling = config.upcycling
    assert changed_settings(again, config) == []


def test_rates_and_schedule_can_be_kept(dense: Path, tmp_path: Path) -> None:
    from nemo_upcycle.bridge import upcycled

    given = _recipe(tmp_path / "run")
    config = upcycled(given, dense, UpcycleSpec(num_experts=4, top_k=2), rates="keep")
    assert (config.optimizer, config.scheduler, config.train) == (given.optimizer, given.scheduler, given.train)
    with pytest.raises(SpecError, match="rates 'papers' does not exist"):
        upcycled(given, dense, None, rates="papers")


def test_biases_of_experts_stay_with_sigmoid_scores_alone(dense: Path, tmp_path: Path) -> None:
    from nemo_upcycle.bridge import with_upcycling

    given = _recipe(tmp_path / "run")
    given.model.num_moe_experts, given.model.moe_router_enable_expert_bias = 8, True
    given.model.moe_router_score_function = "sigmoid"
    scores = {"softmax": {}, "sigmoid": {"router_score": "sigmoid"}}
    kept = {
        score: with_upcycling(given, dense, num_experts=4, top_k=2, **fields).model.moe_router_enable_expert_bias
        for score, fields in scores.items()
    }
    assert kept == {"softmax": False, "sigmoid": True}


def test_data_that_are_not_finished_are_refused(dense: Path, tmp_path: Path) -> None:
    from nemo_upcycle.bridge import upcycled

    with pytest.raises(UpcycleError, match="data"):
        upcycled(_recipe(tmp_path / "run"), str(dense), UpcycleSpec(), tmp_path / "data")
