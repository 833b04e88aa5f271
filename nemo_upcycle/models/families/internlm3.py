"""InternLM3: a Llama. Sequences are limited to the length up to which its rotary frequencies do not change."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, Family
from nemo_upcycle.models.rotary import DYNAMIC


class _InternLm3(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        scaling = config.values["rope_scaling"] or {}  # dynamic: no scaling up to max_position_embeddings
        kept = None if scaling.get("rope_type") == DYNAMIC else config.values["rope_scaling"]
        return super().attention(config, num_layers) | {"rope_scaling": kept}


FAMILY = _InternLm3(
    title="InternLM3",
    hf_class="InternLM3ForCausalLM",
    model_type="internlm3",
    names=llama.NAMES,
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
    spelling={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    computed_as="LlamaForCausalLM",
)
