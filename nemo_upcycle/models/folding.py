"""Fold settings that a Hugging Face class lacks into the weights, so that the class computes the same function.

Let x be the sum that the layers add to. In Granite's and Gemma's models, x starts as e E[token], with the embedding E.
A layer adds r W h to x, with the last matrix W of its attention or network. Attention scores are a q.k, and the logits
are U norm(x) / s, with the output matrix U. A class without these settings computes 1 for e, r and s, and 1 / sqrt(K)
for a. The function stays the same with these weights:

- Embedding e E. The output matrix is always a separate tensor, so it does not get this factor.
- Query a sqrt(K) q. The query is linear in its matrix and bias, and rotating commutes with the factor. If queries are
  normalised, the factor goes to the weight of the norm, because the norm removes a factor before it.
- Last matrices r W, and their biases. If a norm comes after attention and network, the factor goes to its weight.
- Output matrix U / s.
- Experts: f sum(p_e W_e h_e) = sum(p_e (f W_e) h_e), with f = routed_scaling_factor. Shared experts do not change.
- Norms: a norm around zero multiplies by 1 + w, so the weight of a plain norm is 1 + w.

A power of two is exact in every type. Any other factor, and the sum 1 + w, round each weight once. In float32, the
model itself rounds as much. `sources.checks.rounded_because` reports the rounding for 16-bit types.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import MoeFamily, find_family


_NORMS = (
    *("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm", "kept_ffn_norm", "final_norm"),
    *("query_norm", "key_norm"),
)
_LAST = (
    *("attention_out", "fc2", "expert_fc2", "shared_fc2"),
    *("attention_out_bias", "fc2_bias", "expert_fc2_bias"),
)


@dataclass(frozen=True)
class Fold:
    """The change of some weights that replaces a setting.

    Args:
        setting: field of an `Architecture`.
        what: name of the weights in messages.
        roles: roles of the weights in the mapping table.
        factor: factor on the weights.
        offset: number that is added to the weights, before they are multiplied.
    """

    setting: str
    what: str
    roles: tuple[str, ...]
    factor: float = 1.0
    offset: float = 0.0


@functools.cache
def folds(arch: Architecture) -> tuple[Fold, ...]:
    """Return the changes that replace settings of a model in the folder of its Hugging Face class.

    Args:
        arch: architecture of the model; a dense model, or one that no class can hold, has no changes.

    Example:
        >>> folds(granite.upcycled(UpcycleSpec(router_score="sigmoid")))[0].what  # doctest: +SKIP
        'embedding'
    """
    family = find_family(arch.hf_class)
    folded = family.folded(arch) if isinstance(family, MoeFamily) else {}
    query = ("query_norm",) if arch.qk_norm else ("qkv", "qkv_bias")
    last = ("attention_post_norm", "ffn_post_norm") if arch.post_norm else _LAST
    every = (
        Fold(
            "routed_scaling_factor", "down projection", ("expert_fc2", "expert_fc2_bias"), arch.routed_scaling_factor
        ),
        Fold("embedding_multiplier", "embedding", ("embedding",), arch.embedding_multiplier),
        Fold("scaled_embedding", "embedding", ("embedding",), math.sqrt(arch.hidden_size)),
        Fold("attention_multiplier", "query", query, arch.softmax_scale * math.sqrt(arch.head_dim)),
        Fold("residual_multiplier", "outputs of attention and network", last, arch.residual_multiplier),
        Fold("logits_scaling", "output matrix", ("output",), 1 / arch.logits_scaling),
        Fold("zero_centered_norm", "norms", _NORMS, offset=1.0),
    )
    return tuple(fold for fold in every if fold.setting in folded)
