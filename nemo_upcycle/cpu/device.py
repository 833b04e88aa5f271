"""Let code that was written for CUDA run on a CPU: devices, streams, type names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


_CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Creates tensors on the CPU if code asks for CUDA, and leaves every other call unchanged."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if kwargs:
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
        if func is torch.Tensor.to and _is_cuda(args[1] if len(args) > 1 else None):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Stream:
    """The only stream of a CPU: all earlier work has already been done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None:
        """Return at once."""

    def wait_stream(self, stream: _Stream) -> None:
        """Return at once."""

    def record_event(self) -> _Stream:
        """Return an object to synchronize on."""
        return self


_DEVICE_MODE = _CudaMeansCpu()


def place_tensors_on_cpu() -> None:
    """Answer calls to `torch.cuda`, and use the CPU if code names a CUDA device.

    Without this patch nearly every module fails: "Torch not compiled with CUDA enabled". Only calls that would raise
    on this machine are changed, so code outside Megatron and NeMo runs as before. Each torch call takes a microsecond
    longer.
    """
    stream = _Stream()
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]  # a class: transformers 5 has it in annotations
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *args, **kwargs: stream)
    _DEVICE_MODE.__enter__()


class _CudaTypeNames(TorchFunctionMode):
    """Reports a CPU tensor's type as the CUDA type of the same element: `torch.cuda.FloatTensor`."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def with_cuda_type_names(function: Callable) -> Callable:
    """Wrap a function so that, while it runs, the `type()` of CPU tensors is spelled as for CUDA tensors."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _CudaTypeNames():
            return function(*args, **kwargs)

    return call
