"""Make Megatron-Core importable on a machine with a CUDA build of torch but no CUDA device.

Examples are a laptop with torch from PyPI and a cluster's login node. During its import, Megatron-Core 0.15 compiles
an allocator for inference (`unified_memory`). Without a device, torch finds no architecture to compile for and raises
an IndexError. Megatron does not expect this error, so `import nemo.collections.llm` fails. Later releases compile the
allocator when it is used.

If a module of this package imports Megatron or NeMo, the `__init__` of its folder calls `need_no_cuda_to_import`.
Python runs this `__init__` before any module of the folder, so nobody has to remember the order of imports, and a
plain `import nemo_upcycle` changes nothing. tests/unit/utils/test_megatron_import.py enforces this rule.
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
    """Finder for machines without CUDA. It replaces the allocator by Megatron's fallback for a failed compilation."""

    # No abstract base class, because importing importlib.abc takes longer than everything else here.
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != _ALLOCATOR:
            return None
        import torch

        release = import_module("megatron.core.package_info")  # harmless: Megatron is already being imported
        compiles_at_import = (release.MAJOR, release.MINOR) < (0, 16)
        if not compiles_at_import or torch.cuda.is_available():
            return None
        return ModuleSpec(fullname, self)  # type: ignore[arg-type]  # its type asks for the abstract class

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python create the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with the names that Megatron imports from it."""
        vars(module).update(has_unified_memory=False, create_unified_mempool=_refuse)


def _refuse() -> None:
    raise RuntimeError("unified memory needs a CUDA device")


def need_no_cuda_to_import() -> None:
    """Keep Megatron from compiling for CUDA if there is no CUDA device; change nothing else.

    The function imports nothing. It adds a finder to `sys.meta_path` once, because Python offers no other way to
    replace a module of another package before that package is imported.
    """
    if not any(isinstance(finder, _NoUnifiedMemory) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoUnifiedMemory())
