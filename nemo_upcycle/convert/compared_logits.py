"""Logits of two models on the same tokens, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogitComparison:
    """Differences of two models' logits [B, S, V].

    Args:
        tokens: B S.
        max_abs: the largest absolute difference.
        mean_abs: the mean of them all.
        relative: the largest difference over the first model's largest logit.
        same_argmax: share of the tokens for which the likeliest next token is the same.
        layer_relative: for every layer whose outputs were given, norm of the difference over the first model's norm.
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
    """Compare two models' logits, and what their layers hand on.

    Args:
        dense_BSV: the logits to compare with.
        moe_BSV: the other model's, of the same tokens and type.
        dense_layers: outputs of the first model's layers, in order.
        moe_layers: outputs of the other one's.

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
