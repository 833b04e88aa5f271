"""The router of an upcycled layer. The paper (arXiv 2412.09952, section 2): random; distribution, scale not given."""

from __future__ import annotations

import math

import torch

from nemo_upcycle.init.rng import block_generator, normal
from nemo_upcycle.spec import UpcycleSpec


def router_row(spec: UpcycleSpec, layer: int, expert: int, hidden_size: int) -> torch.Tensor:
    """Return the router's weights for one expert.

    With combine weights that sum to one the router does not change the function at step 0, whatever its values; they
    decide which experts drift apart first. With granularity, the rows of one copy's experts are the same, so that they
    are chosen together.

    Args:
        spec: says how, with which deviation and seed.
        layer: number of the layer in the whole model, from 0.
        expert: number of the expert in the layer, from 0, over all expert-parallel ranks.
        hidden_size: D.

    Returns:
        A float32 tensor of shape [D].
    """
    copy = expert // spec.granularity  # the experts of one copy share their row, see `UpcycleSpec.granularity`
    generator = block_generator(spec.seed, "router", layer, copy)
    if spec.router_init == "zero":
        row_D = torch.zeros(hidden_size, dtype=torch.float64)
    elif spec.router_init == "normal":
        row_D = normal((hidden_size,), generator) * spec.router_std
    else:
        bound = math.sqrt(3.0) * spec.router_std
        row_D = (2.0 * torch.rand(hidden_size, generator=generator, dtype=torch.float64) - 1.0) * bound
    return row_D.to(torch.float32)


def router_weight(spec: UpcycleSpec, layer: int, hidden_size: int) -> torch.Tensor:
    """Return the whole router of a layer, float32 [E, D]: `router_row` of every expert."""
    return torch.stack([router_row(spec, layer, expert, hidden_size) for expert in range(spec.num_experts)])
