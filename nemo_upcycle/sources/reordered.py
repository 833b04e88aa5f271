"""A dense network whose neurons come in another order: what a split by co-activation is cut from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nemo_upcycle.sources.base import DenseSource, Index


if TYPE_CHECKING:
    from nemo_upcycle.init.calibration import NeuronOrder


class InNeuronOrder:
    """The matrices of one layer's dense network, seen with their neurons in another order.

    Bounds are places in that order. The neurons of a slice lie anywhere in the stored matrix, so that the part of it
    from the first to the last of them is read, and they are picked from that: of one shard of G nearly the whole
    matrix, G times the bytes of a consecutive cut. A rank that holds all shards of a copy reads the same pages.

    Args:
        source: the dense model.
        order: of the layer's neurons.
        axis: of the matrices, along which the neurons lie: 0 for gate and up, 1 for down.
    """

    def __init__(self, source: DenseSource, order: NeuronOrder, axis: int) -> None:
        self._source, self._neurons, self._axis = source, order.neurons, axis

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Return a slice, a copy. See `DenseSource.read`."""
        bounds, picked = self._stored(name, index)
        return self._source.read(name, bounds).index_select(self._axis, picked)

    def prefetch(self, name: str, index: Index | None = None) -> None:
        """See `DenseSource.prefetch`."""
        self._source.prefetch(name, self._stored(name, index)[0])

    def byte_range(self, name: str, index: Index | None = None) -> None:
        """Return None: neurons that are picked do not lie one after the other."""

    def _stored(self, name: str, index: Index | None) -> tuple[Sequence[tuple[int, int]], torch.Tensor]:
        """Return the bounds of what has to be read, and the places of the neurons in it."""
        bounds = [(0, size) for size in self._source.shape(name)] if index is None else [*index]
        start, stop = bounds[self._axis]
        count = len(self._neurons)
        matrix = start // count  # of gate and up in one tensor
        neurons = self._neurons[start - matrix * count : stop - matrix * count]
        assert len(neurons) == stop - start > 0, (name, bounds)
        first, last = int(neurons.min()), int(neurons.max())
        bounds[self._axis] = (matrix * count + first, matrix * count + last + 1)
        return bounds, neurons - first
