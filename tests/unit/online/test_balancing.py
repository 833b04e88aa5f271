"""What Megatron's routers count when they balance the experts, on either core."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.balancing import check_balancing
from tests.models import build_chunks, small_architecture


pytestmark = pytest.mark.usefixtures("megatron")
TOKENS, EXPERTS = (8, 2), 4
PADDED: dict[str, Any] = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
LOSSES: dict[str, dict[str, Any]] = {
    **{
        kind: {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 1.0}
        for kind in ("aux_loss", "seq_aux_loss", "global_aux_loss")
    },
    "z_loss": {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 1.0},
}
SIGNS: dict[str, Any] = {
    "moe_router_load_balancing_type": "none",
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
}


def _router(**settings: Any) -> Any:
    (chunk,) = build_chunks(small_architecture(num_layers=1), num_experts=EXPERTS, **settings)
    return chunk.train().decoder.layers[0].mlp.router


def _logits() -> torch.Tensor:
    """Return logits that prefer the first expert."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*TOKENS, EXPERTS, generator=generator) + torch.tensor([2.0, 0.0, 0.0, 0.0])


def gradient_of(settings: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Return what the auxiliary losses of a router with these settings add to the gradient of its logits."""
    from nemo_upcycle.trainers.aux_loss import gradient_of_losses

    return gradient_of_losses(_router(**settings), logits.clone().requires_grad_())


@pytest.mark.parametrize("kind", LOSSES)
def test_an_auxiliary_loss_does_not_count_what_pads_the_experts_buffers(kind: str) -> None:
    """As in Megatron-LM's issue 1617 of 2025: there a padded buffer made every expert look as busy as all others."""
    plain, padded = (gradient_of(LOSSES[kind] | padding, _logits()) for padding in ({}, PADDED))
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(padded, plain)


def test_biases_that_balance_experts_do_count_it_and_would_not_move() -> None:
    counts = []
    for settings in (SIGNS, SIGNS | PADDED):
        router = _router(**settings)
        router.routing(_logits())
        counts.append(router.local_tokens_per_expert)
    assert counts[0].max() > counts[0].min()
    assert counts[1].max() == counts[1].min()
    with pytest.raises(SpecError, match="moe_pad_expert_input_to_capacity: got True, expected false with"):
        check_balancing(router.config, "sigmoid")
