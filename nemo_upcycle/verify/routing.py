"""Does top-k pick whole copies of the dense network, where granularity cut it? In 16 bits it may not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nemo_upcycle.utils.dtypes import dtype_name


@dataclass(frozen=True)
class TornTokens:
    """Tokens to which top-k gives parts of several copies in some layer, in a model of that type.

    Args:
        dtype: the type.
        tokens: how many were routed.
        torn: how many of them got parts.
        share: torn over tokens.
    """

    dtype: str
    tokens: int
    torn: int
    share: float


def count_torn_tokens(
    router_logits: Iterable[torch.Tensor], granularity: int, top_k: int, dtype: torch.dtype
) -> TornTokens:
    """Count the tokens for which top-k, as transformers does it, does not take whole copies in some layer.

    Args:
        router_logits: of every MoE layer, [T, E].
        granularity: G, the experts of one copy.
        top_k: experts that a token passes through.
        dtype: the model's type, to be named.
    """
    torn_layers = []
    for logits_TE in router_logits:
        chosen_Tk = logits_TE.softmax(-1, dtype=torch.float32).topk(top_k).indices
        taken_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_Tk, True)
        copies_TCG = taken_TE.unflatten(1, (-1, granularity))
        torn_layers.append((copies_TCG.any(-1) != copies_TCG.all(-1)).any(-1))
    torn_T = torch.stack(torn_layers).any(0)
    torn = int(torn_T.sum())
    return TornTokens(dtype_name(dtype), len(torn_T), torn, torn / len(torn_T))
