"""Attributes of other libraries' objects, changed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


_MISSING = object()


@contextmanager
def temporarily_set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute while the block runs, and restore it afterwards.

    Args:
        owner: a module or another object; an attribute that it does not have is deleted afterwards.
        name: the attribute to set.
        value: what it is inside the block.

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
