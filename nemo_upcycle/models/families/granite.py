"""Granite 3: a Llama whose embedding, attention scores, residual branches and logits are multiplied by constants."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family, Settings


DEFAULTS = COMMON_DEFAULTS | {
    **{"max_position_embeddings": 2048, "embedding_multiplier": 1.0, "attention_multiplier": 1.0},
    **{"residual_multiplier": 1.0, "logits_scaling": 1.0},
}


def multipliers(settings: Settings) -> dict[str, float]:
    """Return the fields of an `Architecture` that a Granite multiplies by, or divides its logits by."""
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    return {name: settings.number(name) for name in names}


class _Granite(Family):
    def attention(self, settings: Settings, num_layers: int) -> dict[str, Any]:
        return super().attention(settings, num_layers) | multipliers(settings)


FAMILY = _Granite(
    title="Granite 3",
    hf_class="GraniteForCausalLM",
    model_type="granite",
    names=llama.NAMES,
    defaults=DEFAULTS,
    has_multipliers=True,
)
