"""Model families that the package does not have, each its one record: what a new one may say of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemo_upcycle.models import families
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import Family, MoeFamily, llama, qwen3
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Settings
from nemo_upcycle.models.families.routed import ROUTED_NAMES


_QKV, _GATE_UP = llama.LAYER + "self_attn.qkv_proj.weight", llama.LAYER + "mlp.gate_up_proj.weight"
PHI3 = Family(
    title="Phi-3",
    hf_class="Phi3ForCausalLM",
    model_type="phi3",
    names=llama.NAMES | {"qkv": (_QKV, _QKV, _QKV), "fc1": (_GATE_UP, _GATE_UP)},
    defaults=COMMON_DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)
OLMO2 = Family(
    title="OLMo 2",
    hf_class="Olmo2ForCausalLM",
    model_type="olmo2",
    names=qwen3.NAMES
    | {
        "attention_norm": (llama.LAYER + "post_attention_layernorm.weight",),
        "ffn_norm": (llama.LAYER + "post_feedforward_layernorm.weight",),
    },
    defaults=COMMON_DEFAULTS | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "qk_norm": True},
    post_norm=True,
    wide_qk_norm=True,
)


class _FlexOlmo(MoeFamily):
    def experts(self, settings: Settings, num_layers: int) -> dict[str, Any]:
        return {
            "num_experts": settings.whole("num_experts"),
            "top_k": settings.whole("num_experts_per_tok"),
            "expert_ffn_size": settings.whole("intermediate_size"),
            "norm_topk": settings.flag("norm_topk_prob"),
        }

    def limits(self, arch: Architecture) -> dict[str, bool]:
        others = bool(arch.shared_ffn_size or arch.moe_pattern or arch.qkv_bias)
        return super().limits(arch) | {"shared experts, dense layers or biases": others, "no norms": not arch.qk_norm}

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        return {
            "num_experts": arch.num_experts,
            "intermediate_size": arch.expert_ffn_size,
            "norm_topk_prob": arch.norm_topk,
        }


FLEX_OLMO = _FlexOlmo(
    title="FlexOlmo",
    hf_class="FlexOlmoForCausalLM",
    model_type="flex_olmo",
    names=OLMO2.names | ROUTED_NAMES,
    defaults=COMMON_DEFAULTS | {"max_position_embeddings": 4096, "rope_theta": 5e5, "qk_norm": True},
    post_norm=True,
    wide_qk_norm=True,
)


@contextmanager
def registered(*added: Family) -> Iterator[None]:
    """Let the package know families for a while."""
    for family in added:
        families.register(family)
    try:
        yield
    finally:
        for family in added:
            del families._FAMILIES[family.hf_class]
