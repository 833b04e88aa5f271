"""GPT-OSS: a window in every second layer, a sink for every head, biases everywhere. It is planned only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.models.families.base import COMMON_DEFAULTS, FULL, WINDOW, Family, Settings
from nemo_upcycle.models.families.routed import experts_everywhere


class _GptOss(Family):
    def planned_only(self, config: Mapping[str, Any]) -> str:
        return "windows in some layers and sinks"

    def attention(self, settings: Settings, num_layers: int) -> dict[str, Any]:
        kinds = self._layer_types(settings, num_layers, (WINDOW, FULL)) or [WINDOW, FULL] * num_layers
        return {"attention_sinks": True, "window_pattern": tuple(kind == WINDOW for kind in kinds[:num_layers])}

    def experts(self, settings: Settings, num_layers: int) -> dict[str, Any]:
        return experts_everywhere(settings, "num_local_experts")


FAMILY = _GptOss(
    title="GPT-OSS",
    hf_class="GptOssForCausalLM",
    model_type="gpt_oss",
    names={},
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rope_theta": 150000.0}
    | {"rms_norm_eps": 1e-5, "sliding_window": 128, "attention_bias": True, "mlp_bias": True},
    has_window=True,
)
