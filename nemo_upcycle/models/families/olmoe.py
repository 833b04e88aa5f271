"""OLMoE: norms before attention and network, those of query and key over all heads; experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import qwen3
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, MoeFamily, Settings
from nemo_upcycle.models.families.routed import ROUTED_NAMES, experts_everywhere


class _Olmoe(MoeFamily):
    def experts(self, settings: Settings, num_layers: int) -> dict[str, Any]:
        if "clip_qkv" in settings.values:
            raise settings.wrong("clip_qkv", "null", "use a checkpoint whose query, key and value are not cut off")
        return experts_everywhere(settings, "num_experts") | {"norm_topk": settings.flag("norm_topk_prob")}

    def limits(self, arch: Architecture) -> dict[str, bool]:
        return super().limits(arch) | {
            "no norms of query and key": not arch.qk_norm,
            "biases of query, key and value alone": arch.qkv_bias and not arch.attention_out_bias,
            "shared experts": arch.shared_ffn_size > 0,
            "dense layers": arch.moe_pattern is not None,
            "a sliding window": arch.window is not None,
        }

    def caveats(self, arch: Architecture) -> Iterator[str]:
        yield "vLLM, SGLang, llama.cpp: none of them was run with this class"

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        return {
            "num_experts": arch.num_experts,
            "intermediate_size": arch.expert_ffn_size,
            "norm_topk_prob": arch.norm_topk,
            **({"attention_bias": True} if arch.attention_out_bias else {}),
        }


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
