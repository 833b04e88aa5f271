"""DeepSeek-V3, and Kimi K2: latent attention, shared experts, multi-token prediction. It is planned only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.models.architecture import LatentAttention
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family, Settings
from nemo_upcycle.models.families.routed import experts_after_dense


class _DeepseekV3(Family):
    def planned_only(self, config: Mapping[str, Any]) -> str:
        return "latent attention"

    def attention(self, settings: Settings, num_layers: int) -> dict[str, Any]:
        latent = LatentAttention(
            query_rank=settings.whole("q_lora_rank") if "q_lora_rank" in settings.values else None,
            kv_rank=settings.whole("kv_lora_rank"),
            nope_dim=settings.whole("qk_nope_head_dim"),
            rope_dim=settings.whole("qk_rope_head_dim"),
            value_dim=settings.whole("v_head_dim"),
        )
        return super().attention(settings, num_layers) | {
            "latent": latent,
            "head_dim": latent.nope_dim + latent.rope_dim,
            "num_kv_heads": settings.whole("num_attention_heads"),
            "mtp_layers": settings.whole("num_nextn_predict_layers", 0, least=0),
        }

    def experts(self, settings: Settings, num_layers: int) -> dict[str, Any]:
        return experts_after_dense(settings, num_layers)


FAMILY = _DeepseekV3(
    title="DeepSeek-V3",
    hf_class="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    names={},
    defaults=COMMON_DEFAULTS
    | {"max_position_embeddings": 4096, "first_k_dense_replace": 3}
    | {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
)
