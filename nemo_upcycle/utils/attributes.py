"""Temporary changes to attributes of other libraries' objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


_MISSING = object()


@contextmanager
def temporarily_set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute while the block runs, and restore it afterwards.

    Args:
        owner: a module or another object. If it lacks the attribute, the attribute is deleted afterwards.
        name: the attribute to set.
        value: the attribute's value inside the block.

    Example:
        >>> with temporarily_set(logging.getLogger("nemo_run"), "disabled", True):  # doctest: +SKIP
        ...     parse()
    """
    before = getattr(owner, name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
