"""The router of an upcycled layer. The paper (arXiv 2412.09952, section 2): random; distribution, scale not given.

Of a parent with experts the rows are copied, and numbers of the same distributions are added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nemo_upcycle.init.experts import ExpertMatrix
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
    rows_CD = _drawn(spec, layer, hidden_size, spec.copies)
    return rows_CD.to(torch.float32).repeat_interleave(spec.granularity, dim=0)


def _drawn(spec: UpcycleSpec, layer: int, hidden_size: int, count: int) -> torch.Tensor:
    """Return so many rows in float64, each from a generator of its own."""
    generators = [block_generator(spec.seed, "router", layer, row) for row in range(count)]
    return ROUTER_INITS[spec.router_init].rows(spec, layer, hidden_size, generators)


@dataclass(frozen=True)
class RowNoise:
    """What tells the copies of a parent's expert apart: noise on their rows of the router, whose sum is zero.

    Its standard deviation, before the mean over the copies is taken off, is router_std times that of all weights of
    the layer's router, so that one number serves any model. The row of an expert with one copy stays as it is.

    Args:
        sources: the parent's expert that each one is a copy of.
    """

    sources: tuple[int, ...]

    def made_by(self, spec: UpcycleSpec) -> str:
        """Return the receipt's words for a changed router."""
        return f"router_init={spec.router_init} added, std={spec.router_std} of the parent's, seed={spec.seed}"

    def change(self, matrix: ExpertMatrix, spec: UpcycleSpec) -> None:
        """Add the noise, computed in float64; every rank has all rows."""
        rows_ED = matrix.local_FD
        _, deviation = replace(matrix, whole_FD=lambda: rows_ED).mean_and_std()
        noise_ED = _drawn(spec, matrix.layer, rows_ED.shape[1], len(self.sources)) * deviation
        sources_E = torch.tensor(self.sources)
        sums = torch.zeros(1 + max(self.sources), rows_ED.shape[1], dtype=torch.float64)
        means = sums.index_add_(0, sources_E, noise_ED) / torch.bincount(sources_E)[:, None]
        rows_ED.copy_(rows_ED.double() + (noise_ED - means[sources_E]).to(rows_ED.device))
