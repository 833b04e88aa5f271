"""Let `inspect` show the arguments of NeMo's classes in every Python version.

Before Python 3.11.4, `inspect` shows the arguments of any inherited `__new__` if a class has no `__init__` of its own.
NeMo's `IOMixin` has a `__new__` that takes everything, so a `run.Config` of `nl.Trainer` or `UpcycleStrategy` would
know neither the names nor the defaults of the arguments.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from nemo.lightning.io.mixin import IOMixin


class NearestSignature:
    """The `__signature__` of a class, taken from its nearest `__new__` or `__init__`, as in Python 3.11.4 and up."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")  # for an instance, `inspect` then shows its __call__
        name = next(name for base in owner.__mro__ for name in ("__new__", "__init__") if name in vars(base))
        signature = inspect.signature(getattr(owner, name))
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def repair_signatures() -> None:
    """Let `inspect`, and so fiddle and NeMo-Run, show the arguments that NeMo's classes are constructed with."""
    if sys.version_info < (3, 11, 4):
        IOMixin.__signature__ = NearestSignature()
