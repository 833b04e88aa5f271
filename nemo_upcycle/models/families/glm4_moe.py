"""Glm4-MoE: scaled sigmoid scores, ungated shared experts, dense first layers, norms of query and key."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import llama, qwen3
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ZERO_FILLED, ConfigValues, MoeFamily, zero_filled
from nemo_upcycle.models.families.routed import ROUTED_NAMES


_MLP = llama.LAYER + "mlp."
_SHARED = _MLP + "shared_experts."


class _Glm4Moe(MoeFamily):
    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        if config.values.get("n_group", 1) != 1:
            raise config.wrong("n_group", "1", "use a checkpoint whose experts are not chosen by group")
        zeros, experts = zero_filled(config), config.whole("n_routed_experts")
        width = config.whole("moe_intermediate_size")
        shared = config.whole("n_shared_experts", 1, least=0) * width
        dense_layers = config.whole("first_k_dense_replace", 1, least=0, most=num_layers - 1)
        return {
            "num_experts": experts,
            "top_k": config.whole("num_experts_per_tok", most=experts),
            "expert_ffn_size": width,
            "shared_ffn_size": 0 if "shared_expert" in zeros else shared,
            "moe_pattern": tuple(layer >= dense_layers for layer in range(num_layers)) if dense_layers else None,
            "norm_topk": config.flag("norm_topk_prob"),
            "router_score": "sigmoid",
            "routed_scaling_factor": config.number("routed_scaling_factor"),
            "balancing_bias": "balancing_bias" not in zeros,
        }

    def limits(self, arch: Architecture) -> dict[str, bool]:
        pattern = [arch.is_moe_layer(layer) for layer in range(arch.num_layers)]
        return super().limits(arch) | {
            "dense layers behind an MoE layer": pattern != sorted(pattern),
            "another activation than SiLU": arch.activation != "silu",
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        width = arch.expert_ffn_size or 1
        zeros = {"shared_expert": not arch.shared_ffn_size, "balancing_bias": not arch.balancing_bias}
        return {
            "n_routed_experts": arch.num_experts,
            "n_shared_experts": arch.shared_ffn_size // width or 1,
            ZERO_FILLED: [name for name, absent in zeros.items() if absent],
            "num_nextn_predict_layers": 0,
            "intermediate_size": arch.ffn_size,
            "moe_intermediate_size": width,
            "first_k_dense_replace": arch.num_layers - arch.moe_layer_count,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": arch.norm_topk,
            "routed_scaling_factor": arch.routed_scaling_factor,
            "attention_bias": arch.qkv_bias,
            "use_qk_norm": arch.qk_norm,
            "partial_rotary_factor": arch.rotary_percent,
        }

    def constants(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the shared expert, and the bias that balances the routed experts, if the model lacks them."""
        shapes: dict[str, tuple[int, ...]] = {}
        if not arch.balancing_bias:
            shapes |= dict.fromkeys(self.names["balancing_bias"], (arch.num_experts or 0,))
        if not arch.shared_ffn_size:
            width = arch.expert_ffn_size or 0
            shapes |= dict.fromkeys(self.names["shared_fc1"], (width, arch.hidden_size))
            shapes |= dict.fromkeys(self.names["shared_fc2"], (arch.hidden_size, width))
        return self.in_moe_layers(shapes, arch)


FAMILY = _Glm4Moe(
    title="Glm4-MoE",
    hf_class="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    names=qwen3.NAMES
    | ROUTED_NAMES
    | {
        "balancing_bias": (_MLP + "gate.e_score_correction_bias",),
        "shared_fc1": tuple(_SHARED + f"{part}_proj.weight" for part in ("gate", "up")),
        "shared_fc2": (_SHARED + "down_proj.weight",),
    },
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    | {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "partial_rotary_factor": 0.5},
    spelling={"attention_bias": "qkv_bias", "use_qk_norm": "qk_norm"},
    has_partial_rotary=True,
    router_score="sigmoid",
    has_mtp=True,
)
