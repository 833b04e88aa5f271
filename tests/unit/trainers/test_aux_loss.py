"""The measured effect of auxiliary losses on one rank; `tests/distributed/test_balancing.py` covers the layouts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nemo_upcycle.online.receipt import ActingCoefficient
from tests.models import build_chunks, small_architecture


pytestmark = pytest.mark.usefixtures("megatron")
#: Router options beside the plain router; the measurement must not depend on them.
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
def test_every_coefficient_acts_as_set_on_one_rank(settings: dict[str, Any]) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from nemo_upcycle.trainers.aux_loss import correct_losses

    names, values = ["aux_loss", "seq_aux_loss", "global_aux_loss"], [0.012345678, 0.0, 0.03]
    config = _config(
        moe_router_load_balancing_type=names, moe_aux_loss_coeff=values, moe_z_loss_coeff=1e-3, **settings
    )
    before, scale = MoEAuxLossAutoScaler.set_loss_scale, MoEAuxLossAutoScaler.main_loss_backward_scale
    random_state = torch.get_rng_state()
    assert correct_losses(config) == [
        ActingCoefficient("aux_loss", 0.012345678, 0.012345678, "as set"),
        ActingCoefficient("global_aux_loss", 0.03, 0.03, "as set"),
        ActingCoefficient("z_loss", 1e-3, 1e-3, "as set"),
    ]
    assert MoEAuxLossAutoScaler.set_loss_scale is before
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is scale
    assert torch.equal(torch.get_rng_state(), random_state)
    assert config.moe_aux_loss_coeff == values


@pytest.mark.parametrize("changes", [{"num_experts": None}, {"moe_router_load_balancing_type": "none"}])
def test_a_model_without_auxiliary_losses_reports_no_coefficient(changes: dict[str, Any]) -> None:
    from nemo_upcycle.trainers.aux_loss import correct_losses

    assert correct_losses(_config(**changes)) == []


def test_a_coefficient_that_rises_from_zero_is_corrected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from nemo_upcycle.trainers.aux_loss import correct_losses

    megatrons = MoEAuxLossAutoScaler.set_loss_scale
    # Halve the scale, as on two ranks of a context-parallel group.
    halving = staticmethod(lambda scale: megatrons(scale / 2))
    monkeypatch.setattr(MoEAuxLossAutoScaler, "set_loss_scale", halving)
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    assert correct_losses(_config(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.0)) == []
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    assert MoEAuxLossAutoScaler.main_loss_backward_scale == 1.0


def test_a_job_warns_of_a_loss_with_another_effect(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_upcycle.trainers.aux_loss import _report
    from nemo_upcycle.utils.progress import show_messages

    monkeypatch.setattr(show_messages(), "propagate", True)
    _report([ActingCoefficient("seq_aux_loss", 0.01, 0.00125, "divided"), ActingCoefficient("z_loss", 1, 1, "as set")])
    text = "a coefficient of 0.01 acts as 0.00125 (divided); to compensate, set a coefficient 8 times as large"
    # pytest catches the message twice if the package's logger existed before the test.
    said = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert said == {f"seq_aux_loss: {text}"}
