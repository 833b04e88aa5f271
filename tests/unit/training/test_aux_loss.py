"""What is measured on one rank, and what is said; `tests/distributed/test_aux_loss.py` has the layouts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nemo_upcycle.receipt import ActingCoefficient
from tests.models import build_chunks, small_architecture


pytestmark = pytest.mark.usefixtures("megatron")
#: What Megatron's routers can be asked for beside the plain one; the measurement must not depend on it.
UNUSUAL: list[dict[str, Any]] = [
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    {"moe_router_dtype": "fp64", "moe_input_jitter_eps": 0.1},
]


def _config(**changes: Any) -> Any:
    return build_chunks(small_architecture(num_layers=1), **{"num_experts": 4, **changes})[0].config


@pytest.mark.parametrize("settings", UNUSUAL, ids=lambda value: next(iter(value)))
def test_one_rank_has_every_coefficient_as_set(settings: dict[str, Any]) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from nemo_upcycle.training.aux_loss import act_as_set

    names, values = ["aux_loss", "seq_aux_loss", "global_aux_loss"], [0.012345678, 0.0, 0.03]
    config = _config(
        moe_router_load_balancing_type=names, moe_aux_loss_coeff=values, moe_z_loss_coeff=1e-3, **settings
    )
    before, scale = MoEAuxLossAutoScaler.set_loss_scale, MoEAuxLossAutoScaler.main_loss_backward_scale
    random_state = torch.get_rng_state()
    assert act_as_set(config) == [
        ActingCoefficient("aux_loss", 0.012345678, 0.012345678, "as set"),
        ActingCoefficient("global_aux_loss", 0.03, 0.03, "as set"),
        ActingCoefficient("z_loss", 1e-3, 1e-3, "as set"),
    ]
    assert MoEAuxLossAutoScaler.set_loss_scale is before
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is scale
    assert torch.equal(torch.get_rng_state(), random_state)
    assert config.moe_aux_loss_coeff == values


@pytest.mark.parametrize("changes", [{"num_experts": None}, {"moe_router_load_balancing_type": "none"}])
def test_a_model_without_auxiliary_losses_has_nothing_to_say(changes: dict[str, Any]) -> None:
    from nemo_upcycle.training.aux_loss import act_as_set

    assert act_as_set(_config(**changes)) == []


def test_a_job_warns_of_a_loss_that_does_not_act_as_set(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_upcycle.progress import show_messages
    from nemo_upcycle.training.upcycling import _say

    monkeypatch.setattr(show_messages(), "propagate", True)
    _say([ActingCoefficient("global_aux_loss", 0.01, 0.00125, "divided"), ActingCoefficient("z_loss", 1, 1, "as set")])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = "a coefficient of 0.01 acts as 0.00125 (divided); one that is 8 times as large makes up for it"
    assert record.getMessage() == f"global_aux_loss: {text}"
