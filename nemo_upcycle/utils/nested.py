"""Flat names for the values of nested mappings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def flat(values: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with their joined names.

    Example:
        >>> list(flat({"a": {"b": 1}, "c": 2}, "/"))
        [('a/b', 1), ('c', 2)]
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, separator, f"{prefix}{name}{separator}")
        else:
            yield prefix + name, value
