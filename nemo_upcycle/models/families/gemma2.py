"""Gemma 2: capped scores and logits, norms on both sides, windows in every second layer. It is planned only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.models.families import gemma, llama, olmo2
from nemo_upcycle.models.families.base import Settings


NAMES = llama.NAMES | {
    "attention_post_norm": olmo2.NAMES["attention_post_norm"],
    "ffn_norm": (llama.LAYER + "pre_feedforward_layernorm.weight",),
    "ffn_post_norm": olmo2.NAMES["ffn_post_norm"],
}


class _Gemma2(gemma.Gemma):
    def planned_only(self, config: Mapping[str, Any]) -> str:
        return "capped scores and logits"

    def attention(self, settings: Settings, num_layers: int) -> dict[str, Any]:
        return {"window_pattern": self._pattern(self._windowed(settings, num_layers, every=2))}


FAMILY = _Gemma2(
    title="Gemma 2",
    hf_class="Gemma2ForCausalLM",
    model_type="gemma2",
    names=NAMES,
    defaults={**gemma.FAMILY.defaults, "num_key_value_heads": 4, "sliding_window": 4096},
    post_norm=True,
    has_window=True,
)
