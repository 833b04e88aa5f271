"""Fill parameters that Transformer Engine keeps in FP8 or FP4 (`fp8_param_gather`, `fp4_param_gather`).

A dense slice cannot be copied into such a parameter through views. But Megatron asks Transformer Engine to keep the
16-bit values from before quantization in CPU memory. The distributed optimizer makes master weights from these values.
Therefore this module fills these values, and Transformer Engine's own quantizer makes the parameter from them.
"""

from __future__ import annotations

from typing import Any

import torch


def is_quantized(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is a Float8Tensor, Float8BlockwiseQTensor, MXFP8Tensor or NVFP4Tensor."""
    from megatron.core.fp8_utils import is_float8tensor

    return bool(is_float8tensor(parameter))


def kept_values(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return the values from which master weights will be made, or None if no values are kept.

    A model that is built without gradients keeps no values. An optimizer drops the values after it has made its master
    weights.
    """
    get = getattr(parameter, "get_high_precision_init_val", None)
    return get() if get else None


def values_to_fill(parameter: torch.Tensor) -> torch.Tensor:
    """Return the tensor to fill for a quantized parameter: the kept values, or a new tensor in CPU memory."""
    kept = kept_values(parameter)
    if kept is not None:
        return kept
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta" if parameter.is_meta else "cpu")


@torch.no_grad()
def quantize(parameter: Any, values: torch.Tensor) -> None:
    """Write values into a quantized parameter, in place.

    Delayed scaling takes its scale from earlier steps. Before the first step the scale is 1. With this scale, weights
    around 0.02 lose most of their bits. The recorded largest value is also wrong, because it comes from the memory
    from which the parameter was created. This function sets the scale and the largest value.

    Args:
        parameter: quantized parameter, see `is_quantized`.
        values: numbers in the parameter's shape.
    """
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    quantizer = parameter._quantizer
    if isinstance(quantizer, Float8Quantizer):
        quantizer.calibrate(values)
        largest = quantizer.amax.item()
        quantizer.scale.fill_(torch.finfo(torch.float8_e4m3fn).max / largest if largest else 1.0)
    parameter.quantize_(values)
