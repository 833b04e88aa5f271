"""Activation functions, recognised by the values that they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as functional


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Square positive values and set all others to zero.

    This function needs a name, because a saved recipe refers to functions by name.
    """
    return functional.relu(x).square()


#: Name of a function in Megatron or NeMo -> activation. The function is looked up by name, because calling some of
#: these functions compiles them.
_FUNCTIONS = {
    "openai_gelu": "gelu_tanh",
    "fast_gelu": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "squared_relu": "squared_relu",
}
#: Name of an activation in an architecture -> activation function.
_KNOWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,  # differs from gelu_tanh by up to 5e-4
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "squared_relu": squared_relu,
}


def activation_of(function: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Return the name that architectures use for an activation function. The values identify the function.

    An unknown function keeps its own name.

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
    """Return the activation function for a name in an architecture. This is the inverse of `activation_of`."""
    return _KNOWN[activation]
