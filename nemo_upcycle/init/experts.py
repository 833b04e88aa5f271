"""The experts of an upcycled layer, made in place from the dense feed-forward network.

Matrices are seen neuron by neuron: gate and up as their rows [F, D], down as its columns [F, D] (a transposed view).
Tensor parallelism cuts networks between neurons, so a rank holds some neurons of an expert, whole.

Random numbers come in blocks of `BLOCK` neurons, each with a generator of its own: a rank draws the blocks that its
neurons lie in and uses its part, so that any layout, and a conversion without any, gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nemo_upcycle.init.rng import block_generator, normal
from nemo_upcycle.spec import UpcycleSpec


#: Neurons whose random numbers are drawn together: 8 MiB in float64 at D = 4096.
BLOCK = 256


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of one expert, as far as it is here.

    Args:
        layer: number of the layer in the whole model, from 0.
        expert: number of the expert in the layer, from 0, over all ranks.
        part: `gate`, `up` or `down`.
        first: number of the first neuron that is here; of the expert's own, from 0.
        local_FD: the neurons that are here, each a row; a view, changed in place.
        whole_FD: gives all neurons of the expert's matrix as they are before any change, in the same type.
    """

    layer: int
    expert: int
    part: str
    first: int
    local_FD: torch.Tensor
    whole_FD: Callable[[], torch.Tensor]


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


def output_factor(spec: UpcycleSpec, role: str, expert: int) -> float:
    """Return the factor on what stands behind a network's activation, which keeps the sum of the experts exact.

    Args:
        spec: has the formulas (`down_scale`, `bias_scale`).
        role: of the mapping table's row.
        expert: number of the routed expert; shared experts count half, as `UpcycleSpec.shared_experts` says.
    """
    if role == "expert_fc2":
        return spec.expert_scale(expert)
    return {"expert_fc2_bias": spec.bias_scale, "shared_fc2": 0.5}.get(role, 1.0)


def change(spec: UpcycleSpec, matrix: ExpertMatrix) -> None:
    """Do to one expert's copy what the spec's method asks for.

    `copy` does nothing. Exact: yes.

    `noise`: w + noise_std * s * n, n from N(0, 1), s the standard deviation of the matrix (Qwen1.5-MoE and OLMoE,
    arXiv 2409.02060, add noise; the scale relative to the weight is ours, so that one number serves any model). Exact:
    no; the difference grows with noise_std.

    `drop` (Drop-Upcycling, arXiv 2502.19261, section 3): floor(drop_ratio * F) neurons, the same for gate, up and down
    (`dropped_neurons`), get m + s * n, m and s the mean and standard deviation of what the matrix held there. Exact:
    no; it is meant to make experts differ.

    Args:
        spec: says which method, how much and with which seed.
        matrix: what to change.
    """
    if spec.method == "noise" and spec.noise_std > 0:
        deviation = _statistics(matrix.whole_FD())[1] * spec.noise_std
        for rows, normal_FD in _blocks(spec, matrix):
            here_FD = matrix.local_FD[rows]
            here_FD.copy_(here_FD.double() + deviation * normal_FD)
    elif spec.method == "drop":
        dropped = dropped_neurons(spec, matrix.layer, matrix.expert, matrix.whole_FD().shape[0])
        if not len(dropped):
            return
        mean, deviation = _statistics(matrix.whole_FD()[dropped])
        is_dropped = torch.zeros(matrix.whole_FD().shape[0], dtype=torch.bool)
        is_dropped[dropped] = True
        for rows, normal_FD in _blocks(spec, matrix):
            chosen = is_dropped[matrix.first + rows.start : matrix.first + rows.stop]
            here_FD = matrix.local_FD[rows]
            here_FD[chosen] = (mean + deviation * normal_FD[chosen]).to(here_FD.dtype).to(here_FD.device)


def dropped_neurons(spec: UpcycleSpec, layer: int, expert: int, size: int) -> torch.Tensor:
    """Return the numbers of the neurons of one expert that are drawn anew: floor(drop_ratio * size), sorted.

    One set for gate, up and down: a neuron whose gate is new and whose down column is old computes neither. (The code
    published with the paper draws three sets, so that at 0.5 an eighth of the neurons stays whole.)
    """
    order = torch.randperm(size, generator=block_generator(spec.seed, "dropped", layer, expert))
    count = math.floor(round(spec.drop_ratio * size, 6))  # 0.41 * 600 is 245.99999999999997
    return order[:count].sort().values


def _statistics(values_FD: torch.Tensor) -> tuple[float, float]:
    """Return mean and standard deviation, rounded to float32: how a sum is split over threads must not show."""
    count = values_FD.numel()
    mean = sum(float(block.sum(dtype=torch.float64)) for block in values_FD.split(BLOCK)) / count
    squares = sum(float((block.double() - mean).square_().sum()) for block in values_FD.split(BLOCK))
    rounded = torch.tensor([mean, (squares / count) ** 0.5], dtype=torch.float64).float()
    return float(rounded[0]), float(rounded[1])


def _blocks(spec: UpcycleSpec, matrix: ExpertMatrix) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the rows of the local neurons, block by block, with their normal numbers."""
    first, count = matrix.first, matrix.local_FD.shape[0]
    for block in range(first // BLOCK, -(-(first + count) // BLOCK)):
        generator = block_generator(spec.seed, spec.method, matrix.layer, matrix.expert, matrix.part, block)
        numbers_FD = normal((BLOCK, matrix.local_FD.shape[1]), [generator])[0]
        start, stop = max(first, block * BLOCK), min(first + count, (block + 1) * BLOCK)
        rows = numbers_FD[start - block * BLOCK : stop - block * BLOCK]
        yield slice(start - first, stop - first), rows.to(matrix.local_FD.device)
