"""Drop-Upcycling (arXiv 2502.19261, section 3): a part of every expert's neurons is drawn anew."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nemo_upcycle.init.methods import init_method


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.init.experts import ExpertMatrix
    from nemo_upcycle.spec import UpcycleSpec


@init_method("copies with some neurons redrawn", strength="drop_ratio", inexact="redraws some neurons")
def drop(matrix: ExpertMatrix, spec: UpcycleSpec) -> None:
    """Give floor(drop_ratio * F) neurons new weights m + s * n in float64, the same neurons in gate, up and down.

    n comes from N(0, 1), m and s are the mean and standard deviation of what the matrix held in these neurons. It is
    meant to make the experts differ.
    """
    import torch

    neurons = matrix.whole_FD().shape[0]
    dropped = dropped_neurons(spec, matrix.layer, matrix.expert, neurons)
    if not len(dropped):
        return
    mean, deviation = matrix.mean_and_std(dropped)
    is_dropped = torch.zeros(neurons, dtype=torch.bool)
    is_dropped[dropped] = True
    for rows, normal_FD in matrix.normal_blocks(spec):
        chosen = is_dropped[matrix.first + rows.start : matrix.first + rows.stop]
        here_FD = matrix.local_FD[rows]
        here_FD[chosen] = (mean + deviation * normal_FD[chosen]).to(here_FD.dtype).to(here_FD.device)


def dropped_neurons(spec: UpcycleSpec, layer: int, expert: int, neurons: int) -> torch.Tensor:
    """Return the numbers of one expert's neurons that are drawn anew: floor(drop_ratio * neurons) of them, sorted.

    One set for gate, up and down: a neuron whose gate is new and whose down column is old computes neither. (The code
    published with the paper draws three sets, so that at 0.5 an eighth of the neurons stays whole.)
    """
    import torch

    from nemo_upcycle.init.rng import block_generator

    order = torch.randperm(neurons, generator=block_generator(spec.seed, "dropped", layer, expert))
    count = math.floor(round(spec.drop_ratio * neurons, 6))  # 0.41 * 600 is 245.99999999999997
    return order[:count].sort().values
