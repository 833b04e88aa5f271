"""Make Megatron-Core importable on a machine with a CUDA build of torch but no CUDA device.

That is a laptop with torch from PyPI, or a cluster's login node. As it is imported, Megatron-Core 0.15 compiles an
allocator for its inference (`unified_memory`); without a device torch finds no architecture to compile for and raises
an IndexError, which Megatron does not expect, so that `import nemo.collections.llm` fails. Later releases compile it
when it is used.

Every folder of this package with a module that imports Megatron or NeMo calls `need_no_cuda_to_import` in its
`__init__`, which Python runs before any module of the folder: so nobody has to remember the order of imports, and
`import nemo_upcycle` alone changes nothing. tests/unit/utils/test_megatron_import.py holds the rule.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


_ALLOCATOR = "megatron.core.inference.unified_memory"


class _NoUnifiedMemory:
    """Replaces the allocator, where there is no CUDA device, by what Megatron uses when it cannot compile it."""

    # Of no abstract class: importlib.abc takes longer to import than all the rest.
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != _ALLOCATOR:
            return None
        import torch

        release = import_module("megatron.core.package_info")  # Megatron is being imported, not by this package
        compiles_at_import = (release.MAJOR, release.MINOR) < (0, 16)
        if not compiles_at_import or torch.cuda.is_available():
            return None
        return ModuleSpec(fullname, self)  # type: ignore[arg-type]  # its type asks for the abstract class

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module."""
        vars(module).update(has_unified_memory=False, create_unified_mempool=_refuse)


def _refuse() -> None:
    raise RuntimeError("unified memory needs a CUDA device")


def need_no_cuda_to_import() -> None:
    """Keep Megatron from compiling for CUDA where there is no CUDA device; change nothing else.

    It adds a finder to `sys.meta_path`, once: Python offers no other way to replace a module of another package before
    that is imported. It imports nothing itself.
    """
    if not any(isinstance(finder, _NoUnifiedMemory) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoUnifiedMemory())
