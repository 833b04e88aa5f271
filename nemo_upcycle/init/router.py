"""The router of an upcycled layer. The paper (arXiv 2412.09952, section 2): random; distribution, scale not given."""

from __future__ import annotations

import torch

from nemo_upcycle.init.rng import block_generator
from nemo_upcycle.spec import ROUTER_INITS, UpcycleSpec


def router_weight(spec: UpcycleSpec, layer: int, hidden_size: int) -> torch.Tensor:
    """Return the router of a layer.

    With combine weights that sum to one the router does not change the function at step 0, whatever its values; they
    decide which experts drift apart first. With granularity, the rows of one copy's experts are the same, so that they
    are chosen together. A row depends on its copy's number, not on how many there are.

    Args:
        spec: says how, with which deviation and seed, or which calibration file has the rows.
        layer: number of the layer in the whole model, from 0.
        hidden_size: D.

    Returns:
        A float32 tensor of shape [E, D], E the experts of all expert-parallel ranks.
    """
    generators = [block_generator(spec.seed, "router", layer, copy) for copy in range(spec.copies)]
    rows_CD = ROUTER_INITS[spec.router_init].rows(spec, layer, hidden_size, generators)
    return rows_CD.to(torch.float32).repeat_interleave(spec.granularity, dim=0)
