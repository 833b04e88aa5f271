"""Grok-1: experts with GELU, norms on both sides of each part, capped scores. It is planned only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.models.families.base import COMMON_DEFAULTS, TANH_GELU, Family, Settings
from nemo_upcycle.models.families.routed import experts_everywhere


class _Grok(Family):
    def planned_only(self, config: Mapping[str, Any]) -> str:
        return "capped scores and norms on both sides"

    def experts(self, settings: Settings, num_layers: int) -> dict[str, Any]:
        return experts_everywhere(settings, "num_experts") | {"norm_topk": False}


FAMILY = _Grok(
    title="Grok-1",
    hf_class="Grok1ModelForCausalLM",
    model_type="grok-1",
    names={},
    defaults=COMMON_DEFAULTS
    | {"num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    | {"intermediate_size": 32768, "tie_word_embeddings": True, "hidden_act": TANH_GELU},
    spelling={"num_local_experts": "num_experts"},
)
