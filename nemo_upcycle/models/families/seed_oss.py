"""Seed-OSS: a Llama with biases of query, key and value, and optionally a bias of the attention output."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, Family


class _SeedOss(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        return super().attention(config, num_layers) | {"attention_out_bias": config.flag("attention_out_bias")}


FAMILY = _SeedOss(
    title="Seed-OSS",
    hf_class="SeedOssForCausalLM",
    model_type="seed_oss",
    names=llama.NAMES,
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "qkv_bias": True},
    spelling={"attention_bias": "qkv_bias"},
    own_settings=("attention_out_bias",),
)
