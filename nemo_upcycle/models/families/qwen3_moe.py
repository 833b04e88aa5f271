"""Qwen3-MoE: Qwen3's attention, dense layers, combine weights that need not sum to one, no shared experts."""

from __future__ import annotations

from collections.abc import Iterator
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

    def caveats(self, arch: Architecture) -> Iterator[str]:
        """See `MoeFamily.caveats`."""
        yield from super().caveats(arch)
        if not arch.norm_topk:
            yield "llama.cpp: it divides the chosen experts' weights by their sum, so its tokens differ"
        if arch.attention_out_bias:  # found in the source code of the servers; neither server was run
            yield "vLLM: it drops the bias of the attention's output without a word, so its tokens differ"
            yield "llama.cpp: it knows no bias of the attention's output in this class"

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
