"""Activation functions, told by what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as functional


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Return the square of what is positive; it has a name that a recipe can be saved by."""
    return functional.relu(x).square()


#: Functions of Megatron and NeMo, by their names: some are compiled when they are first called.
_FUNCTIONS = {
    "openai_gelu": "gelu_tanh",
    "fast_gelu": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "squared_relu": "squared_relu",
}
#: Those of the known families, by an architecture's names.
_KNOWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,  # 5e-4 from the next one
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "squared_relu": squared_relu,
}


def activation_of(function: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Name a model's activation function as an architecture does, told by its values; else by its own name.

    Example:
        >>> activation_of(torch.nn.functional.gelu), activation_of(torch.nn.GELU("tanh"))  # doctest: +SKIP
        ('gelu', 'gelu_tanh')
    """
    name = getattr(function, "__name__", repr(function))
    if name in _FUNCTIONS and str(getattr(function, "__module__", "")).startswith(("megatron.", "nemo.")):
        return _FUNCTIONS[name]
    x = torch.linspace(-6, 6, 121, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        got = function(x)
    return next((kind for kind, known in _KNOWN.items() if torch.allclose(got, known(x), rtol=0, atol=1e-4)), name)


def activation_function(activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return Megatron's activation function of an architecture's name for it: the inverse of `activation_of`."""
    return _KNOWN[activation]
