"""Types of weights by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.errors import UpcycleError


if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the type with that name.

    Raises:
        UpcycleError: it is none of `DTYPES`.

    Example:
        >>> dtype_of("bfloat16")
        torch.bfloat16
    """
    if name not in DTYPES:
        raise UpcycleError.unknown("dtype", name, DTYPES)
    import torch  # takes seconds, which `--help` does without

    dtype: torch.dtype = getattr(torch, name)
    return dtype
