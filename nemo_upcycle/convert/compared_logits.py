"""Compare the logits of two models on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


#: Largest relative difference of logits that rounding causes between two float32 implementations.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class LogitComparison:
    """Differences between two models' logits [B, S, V].

    Args:
        tokens: number of tokens, B S.
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        relative: largest absolute difference divided by the first model's largest absolute logit.
        same_argmax: share of the tokens for which both models have the same most likely next token.
        layer_relative: for every layer whose outputs were given, norm of the difference divided by the norm of the
            first model's output.
    """

    tokens: int
    max_abs: float
    mean_abs: float
    relative: float
    same_argmax: float
    layer_relative: tuple[float, ...] = ()


def compare_logits(
    dense_BSV: torch.Tensor,
    moe_BSV: torch.Tensor,
    dense_layers: Sequence[torch.Tensor] = (),
    moe_layers: Sequence[torch.Tensor] = (),
) -> LogitComparison:
    """Compare two models' logits, and the outputs of their layers.

    Args:
        dense_BSV: logits of the first model.
        moe_BSV: logits of the second model, for the same tokens and in the same type.
        dense_layers: outputs of the first model's layers, in order.
        moe_layers: outputs of the second model's layers, in order.

    Example:
        >>> found = compare_logits(torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[1.0, 2.0]]]))
        >>> found.max_abs, found.relative, found.same_argmax
        (2.0, 0.5, 1.0)
    """
    difference = (moe_BSV - dense_BSV).abs()
    pairs = zip(dense_layers, moe_layers, strict=True)
    return LogitComparison(
        tokens=dense_BSV.shape[:-1].numel(),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        relative=float(difference.max() / dense_BSV.abs().max()),
        same_argmax=float((moe_BSV.argmax(-1) == dense_BSV.argmax(-1)).double().mean()),
        layer_relative=tuple(float((moe - dense).norm() / dense.norm()) for dense, moe in pairs),
    )
