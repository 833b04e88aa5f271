"""Does top-k pick whole copies of the dense network, where granularity cut it? In 16 bits it may not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.mapping import mapping_of
from nemo_upcycle.spec import RouterKind
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


@contextmanager
def router_logits(model: Any, moe_arch: Architecture) -> Iterator[list[torch.Tensor]]:
    """Collect what the routers of a Hugging Face model give for each token, [T, E] for every MoE layer.

    Args:
        model: the model; what it computes inside the context is collected.
        moe_arch: its architecture. Routers compute in float32 or in the model's type, as their kind says.
    """
    (weight,) = mapping_of("router", moe_arch).hf
    collected: list[torch.Tensor] = []

    def collect(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        tokens_TD, weight_ED = args[0].flatten(0, -2), module.weight
        if moe_arch.router_kind.in_float32:
            tokens_TD, weight_ED = tokens_TD.float(), weight_ED.float()
        collected.append(linear(tokens_TD, weight_ED))

    layers = [layer for layer in range(moe_arch.num_layers) if moe_arch.is_moe_layer(layer)]
    named = dict(model.named_modules())
    routers = [weight.format(layer=layer).removesuffix(".weight") for layer in layers]
    if not named.keys() >= set(routers):  # transformers 5 has one name for the block of every class
        routers = [name.replace(".block_sparse_moe.", ".mlp.") for name in routers]
    hooks = [named[name].register_forward_pre_hook(collect) for name in routers]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()


def count_torn_tokens(
    router_logits: Iterable[torch.Tensor], granularity: int, top_k: int, kind: RouterKind, dtype: torch.dtype
) -> TornTokens:
    """Count the tokens for which top-k, as transformers does it, does not take whole copies in some layer.

    Args:
        router_logits: of every MoE layer, [T, E].
        granularity: G, the experts of one copy.
        top_k: experts that a token passes through.
        kind: of the routers.
        dtype: the model's type, to be named.
    """
    torn_layers = []
    for logits_TE in router_logits:
        chosen_Tk = kind.scores(logits_TE.float()).topk(top_k).indices
        taken_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_Tk, True)
        copies_TCG = taken_TE.unflatten(1, (-1, granularity))
        torn_layers.append((copies_TCG.any(-1) != copies_TCG.all(-1)).any(-1))
    torn_T = torch.stack(torn_layers).any(0)
    torn = int(torn_T.sum())
    return TornTokens(dtype_name(dtype), len(torn_T), torn, torn / len(torn_T))
