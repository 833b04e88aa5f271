"""Drop-Upcycling (arXiv 2502.19261, section 3): some of every expert's neurons get new random weights."""

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
    """Redraw floor(drop_ratio * F) neurons as m + s * n in float64, with the same neurons in gate, up and down.

    n comes from N(0, 1). m and s are the mean and standard deviation of these neurons' old weights in the same matrix.
    The new weights are meant to make the experts differ.
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
    """Return the sorted indices of the neurons to redraw in one expert: floor(drop_ratio * neurons) indices.

    The gate, up and down projections share one set of neurons, because a neuron with a new gate row and an old down
    column computes neither the old nor the new function. (The code published with the paper draws three sets. With a
    drop_ratio of 0.5, only an eighth of the neurons then keeps all old weights.)
    """
    import torch

    from nemo_upcycle.init.rng import block_generator

    order = torch.randperm(neurons, generator=block_generator(spec.seed, "dropped", layer, expert))
    count = math.floor(round(spec.drop_ratio * neurons, 6))  # rounded first, because 0.41 * 600 is 245.99999999999997
    return order[:count].sort().values
