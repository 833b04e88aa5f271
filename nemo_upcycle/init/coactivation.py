"""Which neurons of a dense network are active for the same tokens: parts of equal size, found by k-means.

A neuron is the set of tokens for which it is among the most active. All sums are of whole numbers below 2^53, in
float64: they have the same bits in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    import torch

    #: Applies a function to items, several at a time, and yields the results in order.
    Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]

#: A token marks one neuron of so many: those whose activations are the largest.
ACTIVE_SHARE = 10
#: Rounds after which it ends, settled or not.
ROUNDS = 10


class Split(NamedTuple):
    """The order of a layer's neurons, part by part, and how much of their co-activation lies within parts.

    Args:
        neurons: their numbers, [F], ascending in each part.
        within: share of the pairs of active neurons, over all tokens, that are in one part.
        within_consecutive: the same of the cut into consecutive parts.
    """

    neurons: torch.Tensor
    within: float
    within_consecutive: float


def most_active(activations_NF: torch.Tensor) -> torch.Tensor:
    """Return which neurons each token marks, [N, F] of bool.

    Args:
        activations_NF: what enters the down projection.
    """
    import torch

    count = max(1, activations_NF.shape[1] // ACTIVE_SHARE)
    largest_Nk = activations_NF.abs().topk(count, dim=1).indices
    return torch.zeros(activations_NF.shape, dtype=torch.bool).scatter_(1, largest_Nk, True)


def split_by_coactivation(marks: Sequence[torch.Tensor], parts: int, run: Run) -> Split:
    """Cut a network's neurons into parts of equal size whose neurons are active for the same tokens.

    Args:
        marks: which neurons are active, [N, F] of bool for each batch of tokens.
        parts: G, which divides F.
        run: see `Run`.

    Example:
        >>> marks = [torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]).bool()]
        >>> split_by_coactivation(marks, 2, map).neurons.tolist()
        [0, 2, 1, 3]
    """
    import torch

    count = marks[0].shape[1]
    consecutive_F = torch.arange(count) // (count // parts)
    size_F = _sum(run(lambda batch_NF: batch_NF.sum(0).double(), marks))
    chosen_F = _first_parts(marks, parts, size_F, run)
    for _ in range(ROUNDS):
        shared_FG = _shared(marks, chosen_F, parts, run)
        own_F = shared_FG.gather(1, chosen_F[:, None])[:, 0]
        length_G = torch.zeros(parts, dtype=torch.float64).index_add_(0, chosen_F, own_F)
        # A neuron is not to stay where it is because it is there.
        others_FG = shared_FG.scatter_add(1, chosen_F[:, None], -size_F[:, None])
        cosines_FG = others_FG / (size_F.sqrt()[:, None] * length_G.sqrt()).clamp_(min=1.0)
        before_F, chosen_F = chosen_F, _assign(cosines_FG)
        if torch.equal(before_F, chosen_F):
            break
    neurons = torch.cat([(chosen_F == part).nonzero()[:, 0] for part in range(parts)])
    return Split(neurons, *(_within(marks, cut_F, parts, size_F, run) for cut_F in (chosen_F, consecutive_F)))


def _first_parts(marks: Sequence[torch.Tensor], parts: int, size_F: torch.Tensor, run: Run) -> torch.Tensor:
    """Assign the neurons by their likeness to one of each part: the most active one, then those least like others."""
    import torch

    seeds, alike_FG = [int(size_F.argmax())], torch.zeros(len(size_F), parts, dtype=torch.float64)
    is_busy_F = size_F >= size_F.median()
    for part in range(parts):
        shared_F = _sum(run(functools.partial(_active_with, seeds[-1]), marks))
        alike_FG[:, part] = shared_F / (size_F * size_F[seeds[-1]]).sqrt().clamp_(min=1.0)
        most_F = alike_FG[:, : part + 1].max(1).values.masked_fill(~is_busy_F, torch.inf)
        seeds.append(int(most_F.argmin()))
    return _assign(alike_FG)


def _active_with(neuron: int, batch_NF: torch.Tensor) -> torch.Tensor:
    """Return how often each neuron is active together with one of them."""
    return batch_NF[batch_NF[:, neuron]].sum(0).double()


def _sum(counts: Iterator[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(lambda total, count: total + count, counts)


def _shared(marks: Sequence[torch.Tensor], chosen_F: torch.Tensor, parts: int, run: Run) -> torch.Tensor:
    """Return how often each neuron is active together with those of each part, [F, G]."""
    import torch

    one_hot_FG = torch.nn.functional.one_hot(chosen_F, parts).double()

    def shared_FG(batch_NF: torch.Tensor) -> torch.Tensor:
        active_NF = batch_NF.double()
        return active_NF.T @ (active_NF @ one_hot_FG)

    return _sum(run(shared_FG, marks))


def _assign(alike_FG: torch.Tensor) -> torch.Tensor:
    """Return a part for each neuron, F / G of them in each: where a part is full, those least like it move on."""
    import torch

    count, parts = alike_FG.shape
    chosen_F, room = torch.full((count,), -1), [count // parts] * parts
    while len(left := (chosen_F < 0).nonzero()[:, 0]):
        full_G = torch.tensor([not free for free in room])
        best, part_of = alike_FG[left].masked_fill(full_G, -torch.inf).max(1)
        for part, free in enumerate(room):
            wanting = (part_of == part).nonzero()[:, 0]
            taken = wanting[best[wanting].sort(descending=True, stable=True).indices[:free]]
            chosen_F[left[taken]] = part
            room[part] -= len(taken)
    return chosen_F


def _within(
    marks: Sequence[torch.Tensor], chosen_F: torch.Tensor, parts: int, size_F: torch.Tensor, run: Run
) -> float:
    shared_FG = _shared(marks, chosen_F, parts, run)
    alone = size_F.sum()  # a neuron with itself
    return float((shared_FG.gather(1, chosen_F[:, None]).sum() - alone) / (shared_FG.sum() - alone).clamp_(min=1.0))
