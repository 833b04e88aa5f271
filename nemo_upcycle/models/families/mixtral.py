"""Mixtral: routed experts in every layer, combine weights that sum to one."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, MoeFamily
from nemo_upcycle.models.families.routed import experts_everywhere


_MOE = llama.LAYER + "block_sparse_moe."
_EXPERT = _MOE + "experts.{expert}."


class _Mixtral(MoeFamily):
    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        return experts_everywhere(config, "num_local_experts")

    def limits(self, arch: Architecture) -> dict[str, bool]:
        return super().limits(arch) | {
            "biases of query, key and value": arch.qkv_bias,
            "dense layers": arch.moe_pattern is not None,
            "expert weights that do not sum to one": not arch.norm_topk,
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        return {
            "num_local_experts": arch.num_experts,
            "intermediate_size": arch.expert_ffn_size,
            "sliding_window": arch.sliding_window,
        }


FAMILY = _Mixtral(
    title="Mixtral",
    hf_class="MixtralForCausalLM",
    model_type="mixtral",
    names=llama.NAMES
    | {
        "router": (_MOE + "gate.weight",),
        "router_bias": (_MOE + "gate.bias",),
        "expert_fc1": (_EXPERT + "w1.weight", _EXPERT + "w3.weight"),
        "expert_fc1_bias": (_EXPERT + "w1.bias", _EXPERT + "w3.bias"),
        "expert_fc2": (_EXPERT + "w2.weight",),
        "expert_fc2_bias": (_EXPERT + "w2.bias",),
    },
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    has_window=True,
    nemo_module="mixtral",
)
