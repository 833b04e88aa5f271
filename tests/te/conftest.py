"""Lets real Transformer Engine modules be built without a GPU, in the environment of `make test-in ENV=te`.

Without a GPU, the modules cannot compute. But their names, shapes, shards and filled values do not depend on
computing. So it is enough to simulate an H100 while the modules are built.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class _Stream:
    """Stands in for `torch.cuda.Stream`. Attention makes streams when it is built, and these tests never use them."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


_H100 = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
_CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: torch.device("cpu"),
    "get_device_capability": lambda device=None: (_H100.major, _H100.minor),
    "get_device_properties": lambda device=None: _H100,
    "synchronize": lambda device=None: None,
    "Stream": _Stream,
}


@pytest.fixture(scope="module", autouse=True)
def _cuda_seems_to_be_there() -> Iterator[None]:
    """Skip tests without Transformer Engine; without CUDA, install the stand-ins while a test module runs."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not in this environment: `make test-in ENV=te` has one with it")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            cuda = Path(sysconfig.get_path("purelib"), "nvidia", "cu13")
            if cuda.is_dir():
                patch.setenv("CUDA_HOME", str(cuda))  # Transformer Engine looks for NVRTC there, torch for headers
            patch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # Megatron-Core compiles an extension when it is imported
            for name, stand_in in _CUDA.items():
                patch.setattr(torch.cuda, name, stand_in)
            patch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)  # called by tied embeddings before a sum
        yield


@pytest.fixture(scope="module", autouse=True)
def _local_norms(_cuda_seems_to_be_there: None) -> Iterator[None]:
    """Allow sequence parallelism in the local spec, although torch's norm refuses it."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from nemo_upcycle.cpu.patches import mark_norms_sequence_parallel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WrappedTorchNorm, "__new__", WrappedTorchNorm.__new__)  # so that `patch` restores it
        mark_norms_sequence_parallel()
        yield
