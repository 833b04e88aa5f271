"""Replaces Transformer Engine's kernels that quantize and dequantize, because they need a GPU.

The replacements write the bytes of an FP8 cast into the memory of the quantized tensor, so that a test sees which
values were written where. With one scale per tensor, this is the real arithmetic. With scales of blocks, the values
are cast without scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


MOST = torch.finfo(torch.float8_e4m3fn).max


class OnCpu(TorchFunctionMode):
    """Makes scales and the tensors of quantizers on the CPU, although Transformer Engine wants them on CUDA."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def buffer_of(tensor: Any) -> torch.Tensor:
    """Return the memory that holds a quantized tensor's values."""
    return tensor._data if hasattr(tensor, "_data") else tensor._rowwise_data


def cast(values: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return the bytes of values in FP8, flattened."""
    scaled = (values.float() * scale).clamp(-MOST, MOST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten()


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Replace `transformer_engine_torch.quantize`."""
    kind, scale = type(quantizer).__name__, 1.0
    if output is None and kind in ("Float8Quantizer", "Float8CurrentScalingQuantizer"):
        data = torch.empty(tensor.shape, dtype=torch.uint8)
        output = quantizer.create_tensor_from_data(data, fake_dtype=tensor.dtype)
    elif output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=torch.device("cpu"))
    largest = tensor.abs().max().float()
    if kind == "Float8Quantizer":
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest))
        scale = quantizer.scale.item()
    elif kind == "Float8CurrentScalingQuantizer" and 0 < largest < torch.inf:
        scale = (MOST / largest).item()
    buffer = buffer_of(output)
    buffer.view(-1).copy_(cast(tensor.detach(), scale)[: buffer.numel()])  # in FP4, two values share a byte
    if hasattr(output, "_scale_inv"):
        output._scale_inv.fill_(1 / scale)
    return output


def dequantize(tensor: Any, dtype: Any) -> torch.Tensor:
    """Replace `transformer_engine_torch.dequantize` for a tensor with one scale."""
    return (tensor._data.view(torch.float8_e4m3fn).float() * tensor._scale_inv).bfloat16()
