"""Names for one expert in a tensor of all experts of a layer: `NAME[3]` stands for expert 3 of the tensor NAME.

`NAME[3].T` stands for an expert that is stored transposed. Only the code that reads and writes files knows that these
names are slices of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch

_TRANSPOSED = "].T"
#: Value of `from_pretrained`'s argument `experts_implementation` in transformers 5, which makes transformers multiply
#: expert by expert.
EAGER = "eager"
#: By default transformers 5 multiplies all experts at once, by torch's grouped product. The size of a row must then be
#: a multiple of this number (bytes).
GROUPED_BYTES = 16


def needs_eager_experts(widths: Iterable[int], itemsize: int) -> bool:
    """Return whether transformers 5 must multiply expert by expert.

    Args:
        widths: row lengths of the experts' matrices (numbers).
        itemsize: size of a number (bytes).

    Example:
        >>> needs_eager_experts([4096, 172], 2), needs_eager_experts([4096, 172], 4)
        (True, False)
    """
    return any(width * itemsize % GROUPED_BYTES for width in widths)


def is_stacked(name: str) -> bool:
    """Return whether a name stands for an expert in a tensor of all experts."""
    return name.endswith(("]", _TRANSPOSED))


def is_transposed(name: str) -> bool:
    """Return whether a name stands for an expert that is stored transposed in a tensor of all experts."""
    return name.endswith(_TRANSPOSED)


def tensor_of(name: str) -> str:
    """Return the name of the tensor in the file.

    Example:
        >>> tensor_of("block_sparse_moe.input_linear.weight[3]")
        'block_sparse_moe.input_linear.weight'
    """
    return name.rpartition("[")[0] if is_stacked(name) else name


def stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of experts by the tensor that holds them, in the order of the experts."""
    found: dict[str, list[str]] = {}
    for name in filter(is_stacked, names):
        found.setdefault(tensor_of(name), []).append(name)
    return found


def shape_in_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a tensor has in the file."""
    return shape[::-1] if is_transposed(name) else shape


def lies_transposed(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether an expert is stored transposed in a file. transformers 5 never saves experts transposed.

    Args:
        name: name of the expert.
        stored: shape in the file.
        shape: shape of the expert's matrix.
    """
    return is_transposed(name) and stored != shape


def as_in_file(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Transpose a tensor if the file holds it transposed."""
    return tensor.T if is_transposed(name) else tensor
