"""Register functions that Bridge calls with a rank's chunks, and refuse to train a model without weights."""

from __future__ import annotations

import math
from collections import UserList
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.training.models.base import ModelConfig

from nemo_upcycle.errors import SpecError


def refuse_first_step(model: Any, dense: str) -> None:
    """Make a model refuse its first step if nothing has given it weights by then; see `refuse_unfilled`.

    Args:
        model: Bridge's provider, or the configuration of one of Bridge's builders; changed in place.
        dense: address of the checkpoint that should fill the model, for the text of the refusal.
    """
    add_pre_wrap_hook(model, partial(refuse_unfilled, dense))


def pre_wrap_hooks(model: Any) -> list[Any]:
    """Return the functions that Bridge calls with a rank's chunks before they are wrapped."""
    return [*(model.pre_wrap_hooks if isinstance(model, ModelConfig) else getattr(model, "_pre_wrap_hooks", []))]


def add_pre_wrap_hook(model: Any, hook: Callable[[list[Any]], list[Any]]) -> None:
    """Make Bridge call a function with a rank's chunks, after the functions that it already calls."""
    if isinstance(model, ModelConfig):
        # A UserList is used because Bridge empties lists of functions when a command line changes settings. Bridge
        # keeps other sequences.
        model.pre_wrap_hooks = UserList([*model.pre_wrap_hooks, hook])
    else:
        model.register_pre_wrap_hook(hook)


def refuse_unfilled(dense: str, chunks: list[Any]) -> list[Any]:
    """Make newly built chunks refuse their first pass if nothing has given them weights by then.

    Before the chunks get weights, their norms and biases are NaN. Any code that fills or loads a model replaces the
    NaNs. A computation that does not call the chunk itself, such as a schedule that runs the chunk's layers one by
    one, ends with a loss of NaN.

    Args:
        dense: checkpoint that should fill the chunks.
        chunks: chunks of the model on this rank.

    Returns:
        The chunks.
    """

    def look(chunk: Any, _: Any) -> None:
        handles.pop(chunk).remove()
        if any(bool(vector.isnan().any()) for vector in _vectors(chunk)):
            raise SpecError(
                field="config.model",
                kind="state",
                got=f"has no weights of {dense} or of a checkpoint",
                fix=(
                    "pass on the configuration that with_upcycling returned, which has the node `upcycling`. For "
                    "random weights, make the model from nemo_upcycle.models.hf_config.read_architecture(dense)"
                ),
            )

    for chunk in chunks:
        with torch.no_grad():
            for vector in _vectors(chunk):
                vector.fill_(math.nan)
    handles = {chunk: chunk.register_forward_pre_hook(look) for chunk in chunks}
    return chunks


def _vectors(chunk: Any) -> Iterator[torch.Tensor]:
    """Yield a chunk's norms and biases, which are plain tensors even if the weights are kept in FP8 or FP4."""
    return (parameter for parameter in chunk.parameters() if parameter.ndim == 1)
