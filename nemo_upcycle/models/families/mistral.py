"""Mistral: a Llama with a sliding window."""

from __future__ import annotations

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family


FAMILY = Family(
    title="Mistral",
    hf_class="MistralForCausalLM",
    model_type="mistral",
    names=llama.NAMES,
    defaults=COMMON_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    has_window=True,
    nemo_module="mistral",
)
