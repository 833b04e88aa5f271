"""Make Megatron-Core importable on a machine with a CUDA build of torch but no CUDA device.

That is a laptop with torch from PyPI, or a cluster's login node. As it is imported, Megatron-Core 0.15 compiles an
allocator for its inference (`unified_memory`); without a device torch finds no architecture to compile for and raises
an IndexError, which Megatron does not expect, so that `import nemo.collections.llm` fails. Later releases compile it
when it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


_ALLOCATOR = "megatron.core.inference.unified_memory"


class _NoUnifiedMemory(MetaPathFinder, Loader):
    """Replaces the allocator, where there is no CUDA device, by what Megatron uses when it cannot compile it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != _ALLOCATOR:
            return None
        import torch

        release = import_module("megatron.core.package_info")  # Megatron is being imported, not by this package
        compiles_at_import = (release.MAJOR, release.MINOR) < (0, 16)
        return ModuleSpec(fullname, self) if compiles_at_import and not torch.cuda.is_available() else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(has_unified_memory=False, create_unified_mempool=_refuse)


def _refuse() -> None:
    raise RuntimeError("unified memory needs a CUDA device")


def need_no_cuda_to_import() -> None:
    """Keep Megatron from compiling for CUDA where there is no CUDA device; change nothing else."""
    if not any(isinstance(finder, _NoUnifiedMemory) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoUnifiedMemory())
