"""Gemma 3 (text): norms before and after each part, windows in five of six layers with a separate rotary base."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import gemma, llama, olmo2, qwen3
from nemo_upcycle.models.families.base import LOCAL_BASE, ConfigValues


_OTHERS = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


class _Gemma3(gemma.Gemma):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        for name in _OTHERS:
            if config.values.get(name):
                raise config.wrong(name, "none, because Megatron-Core has no such layer", "use another checkpoint")
        every = 6 if config.values.get("layer_types") else config.whole("sliding_window_pattern", 6)
        return {
            "window_pattern": self._pattern(self._windowed(config, num_layers, every)),
            "local_rope_theta": config.number(LOCAL_BASE),
            "attention_multiplier": config.number("query_pre_attn_scalar") ** -0.5,
            "embedding_multiplier": config.whole("hidden_size") ** 0.5,
        }


FAMILY = _Gemma3(
    title="Gemma 3",
    hf_class="Gemma3ForCausalLM",
    model_type="gemma3_text",
    names=qwen3.NAMES
    | {"ffn_norm": (llama.LAYER + "pre_feedforward_layernorm.weight",)}
    | {name: olmo2.NAMES[name] for name in ("attention_post_norm", "ffn_post_norm")},
    defaults={name: value for name, value in gemma.FAMILY.defaults.items() if name != "scaled_embedding"}
    | {"num_key_value_heads": 4, "sliding_window": 4096, "max_position_embeddings": 131072, "rope_theta": 1e6}
    | {"qk_norm": True, LOCAL_BASE: 10000.0, "query_pre_attn_scalar": 256},
    post_norm=True,
    has_window=True,
    layer_patterns=("window_pattern",),
    has_multipliers=True,
)
