"""Granite 3: a Llama whose embedding, attention scores, residual branches and logits are multiplied by constants."""

from __future__ import annotations

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family


DEFAULTS = COMMON_DEFAULTS | {
    **{"max_position_embeddings": 2048, "embedding_multiplier": 1.0, "attention_multiplier": 1.0},
    **{"residual_multiplier": 1.0, "logits_scaling": 1.0},
}
FAMILY = Family(
    title="Granite 3",
    hf_class="GraniteForCausalLM",
    model_type="granite",
    names=llama.NAMES,
    defaults=DEFAULTS,
    has_multipliers=True,
)
