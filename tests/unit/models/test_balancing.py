"""Settings that balance the experts or prevent balancing; `tests/distributed/test_balancing.py` covers the layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.balancing import balancing_bias, bias_fields, check_balancing


SIGNS = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.002}
KIND = "moe_router_load_balancing_type"
QUANTILES = {KIND: "quantile_balancing", "moe_router_quantile_balancing_ema": 0.9}


def _config(**changes: Any) -> Any:
    plain = {"num_moe_experts": 4, KIND: "aux_loss", "moe_router_enable_expert_bias": False, "moe_aux_loss_coeff": 0.0}
    return SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "score", "refused"),
    [
        (SIGNS, "softmax", "moe_router_enable_expert_bias"),
        (SIGNS | {"moe_pad_expert_input_to_capacity": True}, "sigmoid", "moe_pad_expert_input_to_capacity"),
        ({KIND: "quantile_balancing"}, "softmax", KIND),  # this Megatron-Core has no quantile balancing
        (QUANTILES | {KIND: ["quantile_balancing", "aux_loss"]}, "softmax", KIND),
        (QUANTILES | {"moe_aux_loss_coeff": 0.01}, "softmax", "moe_aux_loss_coeff"),
        (QUANTILES | SIGNS, "sigmoid", "moe_router_enable_expert_bias"),
        (QUANTILES | {"moe_router_fusion": True}, "softmax", "moe_router_fusion"),
    ],
)
def test_biases_that_could_not_balance_are_refused_by_name(changes: dict[str, Any], score: str, refused: str) -> None:
    config = _config(**changes)
    with pytest.raises(SpecError) as caught:
        check_balancing(config, score)
    assert caught.value.field == f"model.config.{refused}"
    assert caught.value.got == getattr(config, refused)


@pytest.mark.parametrize(
    ("changes", "score", "moved_by"),
    [
        ({}, "softmax", {}),
        (SIGNS, "sigmoid", {"moe_router_bias_update_rate": 0.002}),
        (QUANTILES, "softmax", {"moe_router_quantile_balancing_ema": 0.9}),
        (SIGNS | {"num_moe_experts": None}, "sigmoid", {}),
    ],
)
def test_what_moves_the_biases_is_named(changes: dict[str, Any], score: str, moved_by: dict[str, float]) -> None:
    check_balancing(config := _config(**changes), score)
    assert balancing_bias(config) == moved_by
    if config.num_moe_experts:
        kept = _config(**bias_fields(moved_by))
        check_balancing(kept, score)
        assert balancing_bias(kept) == moved_by
