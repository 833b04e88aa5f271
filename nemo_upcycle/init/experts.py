"""The experts of an upcycled layer, made in place from the dense feed-forward network.

Matrices are seen neuron by neuron: gate and up as their rows [F, D], down as its columns [F, D] (a transposed view).
Tensor parallelism cuts networks between neurons, so a rank holds some neurons of an expert, whole.

Random numbers come in blocks of `BLOCK` neurons, each with a generator of its own: a rank draws the blocks that its
neurons lie in and uses its part, so that any layout, and a conversion without any, gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nemo_upcycle.init.rng import block_generator, normal
from nemo_upcycle.spec import UpcycleSpec


#: Neurons whose random numbers are drawn together: 8 MiB in float64 at D = 4096.
BLOCK = 256


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of one expert, as far as it is on this rank.

    Args:
        layer: number of the layer in the whole model, from 0.
        expert: number of the expert in the layer, from 0, over all ranks.
        part: `gate`, `up` or `down`.
        first: number of the first neuron that is here, counted within the expert.
        local_FD: the neurons that are here, each a row; a view, changed in place.
        whole_FD: gives all neurons of the expert's matrix as they are before any change, in the same type.
    """

    layer: int
    expert: int
    part: str
    first: int
    local_FD: torch.Tensor
    whole_FD: Callable[[], torch.Tensor]

    def mean_and_std(self, neurons: torch.Tensor | None = None) -> tuple[float, float]:
        """Return mean and standard deviation of the whole matrix, or of these neurons of it, before any change.

        Both are rounded to float32, so that how many threads add up the sum does not show.
        """
        values_FD = self.whole_FD() if neurons is None else self.whole_FD()[neurons]
        count = values_FD.numel()
        mean = sum(float(block.sum(dtype=torch.float64)) for block in values_FD.split(BLOCK)) / count
        squares = sum(float((block.double() - mean).square_().sum()) for block in values_FD.split(BLOCK))
        rounded = torch.tensor([mean, (squares / count) ** 0.5], dtype=torch.float64).float()
        return float(rounded[0]), float(rounded[1])

    def normal_blocks(self, spec: UpcycleSpec) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the rows of `local_FD` block by block, each with its standard normal numbers [rows, D] in float64."""
        first, count = self.first, self.local_FD.shape[0]
        for block in range(first // BLOCK, -(-(first + count) // BLOCK)):
            generator = block_generator(spec.seed, spec.method, self.layer, self.expert, self.part, block)
            numbers_FD = normal((BLOCK, self.local_FD.shape[1]), [generator])[0]
            start, stop = max(first, block * BLOCK), min(first + count, (block + 1) * BLOCK)
            rows = numbers_FD[start - block * BLOCK : stop - block * BLOCK]
            yield slice(start - first, stop - first), rows.to(self.local_FD.device)


def fill_copies(experts: Sequence[torch.Tensor]) -> None:
    """Make every expert's matrix the first one's. Exact: the copies carry the same bits.

    The dense slice was read straight into the first expert, so no copy of it exists anywhere else.

    Args:
        experts: the matrices, or the same part of them, of this rank's experts that hold the same slice, one shape;
            the first holds it already.
    """
    first, *others = experts
    if others:
        torch._foreach_copy_(others, [first] * len(others))
