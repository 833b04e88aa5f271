"""Attributes of other libraries' objects, changed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def temporarily_set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute while the block runs, and restore it afterwards.

    Args:
        owner: a module or another object that has the attribute.
        name: of the attribute.
        value: what it is inside the block.

    Example:
        >>> with temporarily_set(logging.getLogger("nemo_run"), "disabled", True):  # doctest: +SKIP
        ...     parse()
    """
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
