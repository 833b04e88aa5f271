"""Fills parameters that Transformer Engine keeps in FP8 or FP4 (`fp8_param_gather`, `fp4_param_gather`).

A dense slice cannot be copied into such a parameter through views. But Megatron lets Transformer Engine keep, in CPU
memory, the values in 16 bits that it was made of, and its distributed optimizer makes master weights of them. Those
are filled, and Transformer Engine's own quantizer makes the parameter of them.
"""

from __future__ import annotations

from typing import Any

import torch


def is_quantized(parameter: torch.Tensor) -> bool:
    """Return whether it is a Float8Tensor, Float8BlockwiseQTensor, MXFP8Tensor or NVFP4Tensor."""
    from megatron.core.fp8_utils import is_float8tensor

    return bool(is_float8tensor(parameter))


def kept_values(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return the values that master weights are going to be made of; None where none are kept, or no longer.

    Models that are built without gradients have none, and an optimizer gives them up when it has made its masters.
    """
    get = getattr(parameter, "get_high_precision_init_val", None)
    return get() if get else None


def values_to_fill(parameter: torch.Tensor) -> torch.Tensor:
    """Return the tensor to fill in a quantized parameter's place: the kept values, or a new tensor like them."""
    kept = kept_values(parameter)
    if kept is not None:
        return kept
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta" if parameter.is_meta else "cpu")


@torch.no_grad()
def quantize(parameter: Any, values: torch.Tensor) -> None:
    """Write values into a quantized parameter, in place.

    Delayed scaling takes its scale from earlier steps. Before the first it is 1, with which weights of 0.02 lose most
    of their bits, and the largest value so far is that of the memory that the parameter was made of: both are set.

    Args:
        parameter: a tensor that `is_quantized`.
        values: numbers in its shape.
    """
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    quantizer = parameter._quantizer
    if isinstance(quantizer, Float8Quantizer):
        quantizer.calibrate(values)
        largest = quantizer.amax.item()
        quantizer.scale.fill_(torch.finfo(torch.float8_e4m3fn).max / largest if largest else 1.0)
    parameter.quantize_(values)
