"""Qwen3: a Llama that normalises queries and keys, head by head, before the rotary embedding."""

from __future__ import annotations

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family


_ATTENTION = llama.LAYER + "self_attn."
NAMES = llama.NAMES | {"query_norm": (_ATTENTION + "q_norm.weight",), "key_norm": (_ATTENTION + "k_norm.weight",)}
FAMILY = Family(
    title="Qwen3",
    hf_class="Qwen3ForCausalLM",
    model_type="qwen3",
    names=NAMES,
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "qk_norm": True},
    nemo_module="qwen3",
)
