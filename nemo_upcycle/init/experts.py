"""The experts of an upcycled layer, made in place from the dense feed-forward network.

Every matrix is viewed as one row per neuron: the gate and up projections by their rows [F, D], the down projection by
its columns [F, D] (a transposed view). Tensor parallelism cuts networks between neurons, so each neuron of an expert
is whole on one rank.

Random numbers are drawn in blocks of `BLOCK` neurons, and each block has its own generator. A rank draws the blocks
that contain its neurons and uses only their numbers. Therefore every layout, and a conversion without any layout, gets
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nemo_upcycle.init.rng import block_generator, normal
from nemo_upcycle.spec import UpcycleSpec


#: Number of neurons whose random numbers are drawn together: 8 MiB in float64 at D = 4096.
BLOCK = 256


@dataclass(frozen=True)
class ExpertMatrix:
    """This rank's part of one matrix of one expert.

    Args:
        layer: layer number in the whole model, from 0.
        expert: expert number in the layer, from 0, over all ranks.
        part: `gate`, `up` or `down`.
        first: number of the first local neuron, counted within the expert.
        local_FD: the local neurons, one per row; a view that is changed in place.
        whole_FD: function that returns all neurons of the expert's matrix before any change, in the same type.
    """

    layer: int
    expert: int
    part: str
    first: int
    local_FD: torch.Tensor
    whole_FD: Callable[[], torch.Tensor]

    def mean_and_std(self, neurons: torch.Tensor | None = None) -> tuple[float, float]:
        """Return the mean and standard deviation of the whole matrix, or of some neurons, before any change.

        Both numbers are rounded to float32, so that the number of threads that compute the sums does not change the
        result.
        """
        values_FD = self.whole_FD() if neurons is None else self.whole_FD()[neurons]
        count = values_FD.numel()
        mean = sum(float(block.sum(dtype=torch.float64)) for block in values_FD.split(BLOCK)) / count
        squares = sum(float((block.double() - mean).square_().sum()) for block in values_FD.split(BLOCK))
        rounded = torch.tensor([mean, (squares / count) ** 0.5], dtype=torch.float64).float()
        return float(rounded[0]), float(rounded[1])

    def normal_blocks(self, spec: UpcycleSpec) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the rows of `local_FD` in blocks, each block with its standard normal numbers [rows, D] in float64."""
        first, count = self.first, self.local_FD.shape[0]
        for block in range(first // BLOCK, -(-(first + count) // BLOCK)):
            generator = block_generator(spec.seed, spec.method, self.layer, self.expert, self.part, block)
            numbers_FD = normal((BLOCK, self.local_FD.shape[1]), [generator])[0]
            start, stop = max(first, block * BLOCK), min(first + count, (block + 1) * BLOCK)
            rows = numbers_FD[start - block * BLOCK : stop - block * BLOCK]
            yield slice(start - first, stop - first), rows.to(self.local_FD.device)


def fill_copies(experts: Sequence[torch.Tensor]) -> None:
    """Copy the first expert's matrix to all other experts, bit for bit.

    The dense slice was read directly into the first expert, so there is no other copy of the slice.

    Args:
        experts: for each of this rank's experts with the same dense slice: one matrix, or the same part of one matrix.
            All these tensors have the same shape, and the first tensor already holds the slice.
    """
    first, *others = experts
    if others:
        torch._foreach_copy_(others, [first] * len(others))
