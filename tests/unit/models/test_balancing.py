"""What balances the experts and what stands in its way; `tests/distributed/test_balancing.py` has the layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.balancing import balancing_bias, bias_fields, check_balancing


SIGNS = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.002}
QUANTILES = {"moe_router_load_balancing_type": "quantile_balancing", "moe_router_quantile_balancing_ema": 0.9}


def _config(**changes: Any) -> Any:
    plain = {
        "num_moe_experts": 4,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_enable_expert_bias": False,
        "moe_aux_loss_coeff": 0.0,
    }
    return SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "score", "words"),
    [
        (SIGNS, "softmax", ["moe_router_enable_expert_bias", "sigmoid scores"]),
        (
            SIGNS | {"moe_pad_expert_input_to_capacity": True},
            "sigmoid",
            ["moe_pad_expert_input_to_capacity", "no bias moves"],
        ),
        (
            {"moe_router_load_balancing_type": "quantile_balancing"},
            "softmax",
            ["moe_router_load_balancing_type: got quantile_balancing", "0.19", "train in Megatron-Bridge"],
        ),
        (
            QUANTILES | {"moe_router_load_balancing_type": ["quantile_balancing", "aux_loss"]},
            "softmax",
            ["quantile_balancing alone"],
        ),
        (QUANTILES | {"moe_aux_loss_coeff": 0.01}, "softmax", ["moe_aux_loss_coeff: got 0.01, expected 0"]),
        (QUANTILES | SIGNS, "sigmoid", ["moe_router_enable_expert_bias: got True", "biases of its own"]),
        (QUANTILES | {"moe_router_fusion": True}, "softmax", ["moe_router_fusion: got True"]),
    ],
)
def test_biases_that_could_not_balance_are_refused_by_name(
    changes: dict[str, Any], score: str, words: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        check_balancing(_config(**changes), score)
    for word in words:
        assert word in str(caught.value)


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
