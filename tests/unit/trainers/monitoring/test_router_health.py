"""Router health computed from counts, losses and samples; other tests check these inputs on real ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_upcycle.trainers.monitoring.router_health import RouterHealth


def _health(granularity: int = 1) -> RouterHealth:
    sizes = {"num_layers": 3, "num_moe_experts": 4, "moe_router_topk": 2}
    sizes |= {"ffn_hidden_size": 64, "moe_ffn_hidden_size": 64 // granularity}
    losses = {"moe_router_load_balancing_type": "aux_loss", "moe_z_loss_coeff": None}
    return RouterHealth([], SimpleNamespace(**sizes, **losses, moe_router_enable_expert_bias=False))


#: A balanced layer, a layer that used a single expert and dropped half of its slots, and a layer without experts.
COUNTS_LE = torch.tensor([[25.0, 25, 25, 25], [50, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
SUMMED = {
    "counts": COUNTS_LE,
    "slots": torch.tensor([100.0, 100, 0], dtype=torch.float64),
    "load_balancing_loss": torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64),
}


def test_every_layer_is_described() -> None:
    found = _health().describe(SUMMED)
    assert found == {
        "load_min": [0.25, 0.0, None],
        "load_max": [0.25, 1.0, None],
        "load_cv": [0.0, pytest.approx(3**0.5, abs=1e-5), None],
        "load_entropy": [pytest.approx(1.0, abs=1e-6), 0.0, None],
        "dead_experts": [0, 3, None],
        "dropped": [0.0, 0.5, None],
        "load_balancing_loss": [1.0, 4.0, None],
    }


def test_an_expert_below_one_percent_is_dead() -> None:
    counts_LE = torch.tensor([[1000.0, 1000, 1000, 4], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.float64)
    assert _health().describe(SUMMED | {"counts": counts_LE})["dead_experts"][:2] == [1, 0]


@pytest.mark.parametrize(("granularity", "expected"), [(1, 0.5), (2, 0.0)])
def test_the_distance_is_from_the_mean_of_the_copies(granularity: int, expected: float) -> None:
    """Experts 1, 3, 1, 3 differ from their mean by half of the mean, but two copies of shards 1 and 3 are equal."""
    experts_LEW = torch.tensor([1.0, 3, 1, 3], dtype=torch.float64)[None, :, None].expand(3, 4, 5)
    found = _health(granularity).describe(SUMMED | {"experts": experts_LEW})
    assert found["expert_distance"] == [pytest.approx(expected), pytest.approx(expected), None]
