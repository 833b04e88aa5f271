"""A network seen with its neurons in another order: the rows, or columns, that a slice of that order has."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from nemo_upcycle.init.calibration import NeuronOrder
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.reordered import InNeuronOrder


NEURONS, WIDTH = 6, 4
ORDER = NeuronOrder(0, "a test", torch.tensor([1, 3, 4, 0, 2, 5]))


class _Read:
    """Two tensors in memory, and what was read of them."""

    def __init__(self) -> None:
        rows_FD = torch.arange(NEURONS * WIDTH).view(NEURONS, WIDTH)
        self.tensors = {"both": torch.cat([rows_FD, rows_FD + 100]), "down": rows_FD.T.contiguous()}
        self.bounds: list[Any] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, index: Any) -> torch.Tensor:
        self.bounds.append([*index])
        return self.tensors[name][tuple(slice(*bounds) for bounds in index)]

    prefetch = read


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (3, 6), (1, 2), (0, 6)])
def test_rows_of_both_matrices_of_a_tensor_come_in_the_order(start: int, stop: int) -> None:
    read = _Read()
    seen = InNeuronOrder(cast("DenseSource", read), ORDER, 0)
    for matrix in (0, 1):
        at = matrix * NEURONS
        rows = seen.read("both", [(at + start, at + stop), (1, 3)])
        assert torch.equal(rows, read.tensors["both"][ORDER.neurons[start:stop] + at][:, 1:3])


def test_columns_come_in_the_order_and_no_more_is_read_than_spans_them() -> None:
    read = _Read()
    seen = InNeuronOrder(cast("DenseSource", read), ORDER, 1)
    assert torch.equal(seen.read("down", [(0, WIDTH), (0, 3)]), read.tensors["down"][:, [1, 3, 4]])
    seen.prefetch("down", [(0, 2), (0, 3)])
    assert read.bounds == [[(0, WIDTH), (1, 5)], [(0, 2), (1, 5)]]
    assert torch.equal(seen.read("down"), read.tensors["down"][:, ORDER.neurons])


def test_bytes_that_are_picked_lie_nowhere_in_a_row_and_all_else_is_the_sources() -> None:
    seen = InNeuronOrder(cast("DenseSource", _Read()), ORDER, 0)
    assert seen.byte_range("both", [(0, 3), (0, WIDTH)]) is None
    assert seen.shape("down") == (WIDTH, NEURONS)
