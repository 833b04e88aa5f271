"""Registers model families that the package does not have, as other packages can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nemo_upcycle.models import families
from nemo_upcycle.models.families import Family


@contextmanager
def registered(*added: Family) -> Iterator[None]:
    """Register families with the package while the block runs."""
    for family in added:
        families.register(family)
    try:
        yield
    finally:
        for family in added:
            del families._FAMILIES[family.hf_class]
