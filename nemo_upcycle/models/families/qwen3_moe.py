"""Qwen3-MoE: Qwen3's attention, dense layers, combine weights that need not sum to one, no shared experts."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import qwen3
from nemo_upcycle.models.families.base import COMMON_DEFAULTS
from nemo_upcycle.models.families.routed import ROUTED_NAMES, RoutedFamily


class Qwen3Moe(RoutedFamily):
    """Base of Qwen3's MoE classes."""

    def limits(self, arch: Architecture) -> dict[str, bool]:
        """See `MoeFamily.limits`."""
        return super().limits(arch) | {
            "biases of query, key and value alone": arch.qkv_bias and not arch.attention_out_bias,
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        """See `MoeFamily.expert_settings`."""
        return super().expert_settings(arch) | ({"attention_bias": True} if arch.attention_out_bias else {})


FAMILY = Qwen3Moe(
    title="Qwen3-MoE",
    hf_class="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    nemo_module="qwen3",
    names=qwen3.NAMES | ROUTED_NAMES,
    spelling={"num_local_experts": "num_experts"},  # name that transformers 5 saves
    has_attention_bias=True,
    defaults=COMMON_DEFAULTS | {"num_key_value_heads": 4, "max_position_embeddings": 32768, "qk_norm": True},
)
