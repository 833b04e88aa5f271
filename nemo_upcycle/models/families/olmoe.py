"""OLMoE: norms before attention and network, norms of query and key over all heads, experts in every layer."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import qwen3
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues
from nemo_upcycle.models.families.flex_olmo import FlexOlmo
from nemo_upcycle.models.families.routed import ROUTED_NAMES


class _Olmoe(FlexOlmo):
    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        if "clip_qkv" in config.values:
            raise config.wrong("clip_qkv", "null", "use a checkpoint whose query, key and value are not cut off")
        return super().experts(config, num_layers)


FAMILY = _Olmoe(
    title="OLMoE",
    hf_class="OlmoeForCausalLM",
    model_type="olmoe",
    names=qwen3.NAMES | ROUTED_NAMES,
    defaults=COMMON_DEFAULTS
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8}
    | {"qk_norm": True},
    wide_qk_norm=True,
    has_attention_bias=True,
)
