"""Chooses which rows of a table `make test` runs. Only `make weekly` runs the others, marked `full` and `weekly`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(rows: Iterable[Any], *kept: Any) -> list[Any]:
    """Return rows as test parameters; all rows except those in `kept` are marked `full` and `weekly`.

    Args:
        rows: tuples of arguments, or single arguments.
        kept: rows that `make test` runs.

    Example:
        >>> [len(row.marks) for row in quick(["a", "b", "c"], "b")]
        [2, 0, 2]
    """
    rows = list(rows)
    assert all(row in rows for row in kept), kept
    return [_parameters(row if isinstance(row, tuple) else (row,), row in kept) for row in rows]


def every_pair(*axes: Iterable[Any]) -> list[Any]:
    """Return the product of axes as parameters; `make test` runs rows that contain every pair of values.

    Example:
        >>> [row.values for row in every_pair("ab", "cd", "ef") if not row.marks]
        [('a', 'c', 'e'), ('a', 'd', 'f'), ('b', 'c', 'f'), ('b', 'd', 'e')]
    """
    values = [list(axis) for axis in axes]
    rows = itertools.product(*(range(len(axis)) for axis in values))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    kept = set()
    while missing:
        best = max(pairs, key=lambda row: len(pairs[row] & missing))
        kept.add(best)
        missing.difference_update(pairs[best])
    return _product(values, kept)


def every_value(*axes: Iterable[Any]) -> list[Any]:
    """Return the product of axes as parameters; `make test` runs rows that contain every value.

    Example:
        >>> [row.values for row in every_value("ab", "cde") if not row.marks]
        [('a', 'c'), ('a', 'e'), ('b', 'd')]
    """
    values = [list(axis) for axis in axes]
    longest = max(map(len, values))
    return _product(values, {tuple(number % len(axis) for axis in values) for number in range(longest)})


def _product(axes: list[list[Any]], kept: Collection[tuple[int, ...]]) -> list[Any]:
    """Return the product of axes as parameters; `make test` runs the rows in `kept`, given as positions."""
    rows = itertools.product(*(range(len(axis)) for axis in axes))
    return [_parameters(tuple(axis[at] for axis, at in zip(axes, row, strict=True)), row in kept) for row in rows]


def _parameters(row: tuple[Any, ...], is_kept: bool) -> Any:
    return pytest.param(*row, marks=() if is_kept else (pytest.mark.full, pytest.mark.weekly))
