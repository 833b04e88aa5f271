"""Stands in for Transformer Engine in tests that only import it, in `make test-in ENV=bridge-sample`.

Bridge cannot be imported without Transformer Engine, whose binding takes minutes to compile. Every attribute of this
package and of its modules is an empty class that nobody instantiates. Names that begin with an underscore are missing.
"""

import functools
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch.nn import Module


__version__ = "2.16.1"
__path__: list[str] = []


class _Empty(type):
    def __getattr__(cls, name: str) -> Any:
        return __getattr__(name)


@functools.cache
def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name == "get_cpu_offload_context":  # every Megatron model calls this function
        return lambda *_, **__: (nullcontext(), None)
    return _Empty(name, (Module,), {})


class _Parts:
    """Finds every module of the stand-in."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_part = name.startswith("transformer_engine.") and "._" not in name
        return ModuleSpec(name, self, is_package=True) if is_part else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        vars(module)["__getattr__"] = __getattr__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module empty."""


sys.meta_path.append(_Parts())  # type: ignore[arg-type]
