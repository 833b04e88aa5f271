"""Qwen3.5-MoE: a Qwen3.5 with routed experts and a gated shared expert in every layer."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.delta_nets import DELTA_SIZES
from nemo_upcycle.models.families import qwen2_moe, qwen3_5
from nemo_upcycle.models.families.base import FULL, ConfigValues, MoeFamily


class _Qwen35Moe(qwen2_moe.Qwen2Moe):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        kinds = self._layer_types(config, num_layers, (qwen3_5.LINEAR, FULL))
        return qwen3_5.attention(config, kinds, num_layers)

    def limits(self, arch: Architecture) -> dict[str, bool]:
        return MoeFamily.limits(self, arch) | {
            "biases of query, key and value": arch.qkv_bias,
            "dense layers": arch.moe_pattern is not None,
            "expert weights that do not sum to one": not arch.norm_topk,
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        kinds = [qwen3_5.LINEAR if "G" in arch.parts(layer) else FULL for layer in range(arch.num_layers)]
        sizes = {setting: getattr(arch.delta, name) for name, setting in DELTA_SIZES.items()} if arch.delta else {}
        unread = ("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "use_sliding_window", "qkv_bias")
        common = {key: value for key, value in super().expert_settings(arch).items() if key not in unread}
        return common | sizes | {"layer_types": kinds, "partial_rotary_factor": arch.rotary_percent}


FAMILY = _Qwen35Moe(
    title="Qwen3.5-MoE",
    hf_class="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    names={**qwen2_moe.FAMILY.names, **qwen3_5.NAMES},
    defaults=qwen3_5.DEFAULTS | {"num_key_value_heads": 2, "norm_topk_prob": True},
    hf_factors=qwen2_moe.FAMILY.hf_factors,
    hf_offsets=qwen3_5.OFFSETS,
    constant_values=qwen2_moe.FAMILY.constant_values,
    has_partial_rotary=True,
    no_parent_because="whose published checkpoints have all experts of a layer in one tensor",
)
