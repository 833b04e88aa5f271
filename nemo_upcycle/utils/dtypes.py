"""Names of the weights' data types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.errors import UpcycleError


if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype with the given name.

    Raises:
        UpcycleError: the name is not in `DTYPES`.

    Example:
        >>> dtype_of("bfloat16")
        torch.bfloat16
    """
    if name not in DTYPES:
        raise UpcycleError.unknown("dtype", name, DTYPES)
    import torch  # imported here, because it takes seconds and `--help` does not need it

    dtype: torch.dtype = getattr(torch, name)
    return dtype
