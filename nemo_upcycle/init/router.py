"""The router of an upcycled layer.

The paper (arXiv 2412.09952, section 2) uses a random router, but gives neither distribution nor scale. If the parent
has experts, its router rows are copied, and random numbers of the same distributions are added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nemo_upcycle.init.experts import ExpertMatrix
from nemo_upcycle.init.rng import block_generator
from nemo_upcycle.spec import ROUTER_INITS, UpcycleSpec


def router_weight(spec: UpcycleSpec, layer: int, hidden_size: int) -> torch.Tensor:
    """Return the router weight of a layer.

    If the combine weights sum to one, no values of the router change the function at step 0. The values decide which
    experts drift apart first. With granularity, the experts of one copy have the same row, so that they are chosen
    together. A row depends on the index of its copy, not on the number of copies.

    Args:
        spec: gives the initialisation, standard deviation and seed, or the calibration file that has the rows.
        layer: layer number in the whole model, from 0.
        hidden_size: hidden size D.

    Returns:
        A float32 tensor [E, D]. E counts the experts of all expert-parallel ranks.
    """
    rows_CD = _drawn(spec, layer, hidden_size, spec.copies)
    return rows_CD.to(torch.float32).repeat_interleave(spec.granularity, dim=0)


def _drawn(spec: UpcycleSpec, layer: int, hidden_size: int, count: int) -> torch.Tensor:
    """Draw `count` router rows in float64, each from its own generator."""
    generators = [block_generator(spec.seed, "router", layer, row) for row in range(count)]
    return ROUTER_INITS[spec.router_init].rows(spec, layer, hidden_size, generators)


@dataclass(frozen=True)
class RowNoise:
    """Noise for the router rows of an expert's copies. The noise makes the copies differ, and sums to zero over them.

    The noise is drawn with a standard deviation of router_std times the standard deviation of all weights of the
    layer's router, so that one value of router_std serves any model. Then the mean over the copies is subtracted. If
    an expert has only one copy, its row does not change.

    Args:
        sources: for each expert, the parent's expert that it copies.
    """

    sources: tuple[int, ...]

    def made_by(self, spec: UpcycleSpec) -> str:
        """Return how the receipt describes a changed router."""
        return f"router_init={spec.router_init} added, std={spec.router_std} of the parent's, seed={spec.seed}"

    def change(self, matrix: ExpertMatrix, spec: UpcycleSpec) -> None:
        """Add the noise in place, computed in float64. Every rank has all rows."""
        rows_ED = matrix.local_FD
        _, deviation = replace(matrix, whole_FD=lambda: rows_ED).mean_and_std()
        noise_ED = _drawn(spec, matrix.layer, rows_ED.shape[1], len(self.sources)) * deviation
        sources_E = torch.tensor(self.sources)
        sums = torch.zeros(1 + max(self.sources), rows_ED.shape[1], dtype=torch.float64)
        means = sums.index_add_(0, sources_E, noise_ED) / torch.bincount(sources_E)[:, None]
        rows_ED.copy_(rows_ED.double() + (noise_ED - means[sources_E]).to(rows_ED.device))
