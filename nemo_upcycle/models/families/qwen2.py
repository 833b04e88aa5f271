"""Qwen1.5 and Qwen2: a Llama with biases of query, key and value."""

from __future__ import annotations

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family


FAMILY = Family(
    title="Qwen2",
    hf_class="Qwen2ForCausalLM",
    model_type="qwen2",
    names=llama.NAMES,
    defaults=COMMON_DEFAULTS | {"num_key_value_heads": 32, "max_position_embeddings": 32768, "qkv_bias": True},
    nemo_module="qwen2",
)
