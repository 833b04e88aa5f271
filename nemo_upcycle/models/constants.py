"""Tensors that a Hugging Face class always has and Megatron does not: made of nothing but a number."""

from __future__ import annotations

import torch

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import find_family
from nemo_upcycle.models.mapping import hf_constants


#: In the place of zero where a server divides by it: the sigmoid of a sum of such numbers is one half to the last bit.
#: float16 does not have it, and takes its smallest number.
_NEARLY_ZERO = 2.0**-100


def constant_tensors(arch: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the constants of a model's Hugging Face class by name, each one number seen as a whole tensor.

    Args:
        arch: the model.
        dtype: type of its weights.
    """
    family = find_family(arch.hf_class)
    limits = torch.finfo(dtype)
    nearly_zero = torch.tensor(max(_NEARLY_ZERO, limits.smallest_normal * limits.eps), dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    return {
        name: (nearly_zero if family and name.endswith(family.divided_by) else zero).expand(shape)
        for name, shape in hf_constants(arch).items()
    }
