"""Let every Python show the arguments of NeMo's classes.

Before 3.11.4 `inspect` shows a class without an `__init__` of its own with the arguments of any inherited `__new__`.
NeMo's `IOMixin` has one that takes everything: a `run.Config` of `nl.Trainer` or `UpcycleStrategy` would know neither
names nor defaults.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from nemo.lightning.io.mixin import IOMixin


class NearestSignature:
    """The `__signature__` of a class: of the nearest `__new__` or `__init__`, as `inspect` finds it since 3.11.4."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")  # an object is shown by its __call__
        name = next(name for base in owner.__mro__ for name in ("__new__", "__init__") if name in vars(base))
        signature = inspect.signature(getattr(owner, name))
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def repair_signatures() -> None:
    """Let `inspect`, and with it fiddle and NeMo-Run, show NeMo's classes by what they are made with."""
    if sys.version_info < (3, 11, 4):
        IOMixin.__signature__ = NearestSignature()
