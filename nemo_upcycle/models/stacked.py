"""Tensors of a Hugging Face folder that hold all experts of a layer: `NAME[3]` stands for expert 3 of the tensor NAME.

Nothing but what reads and writes the files knows that these are parts of one tensor, one behind the other.
"""

from __future__ import annotations


def is_stacked(name: str) -> bool:
    """Return whether a name is one of an expert in a tensor of all."""
    return name.endswith("]")


def tensor_of(name: str) -> str:
    """Return the name of the tensor in the file.

    Example:
        >>> tensor_of("block_sparse_moe.input_linear.weight[3]")
        'block_sparse_moe.input_linear.weight'
    """
    return name.rpartition("[")[0] if is_stacked(name) else name
