"""Common parts of Qwen's MoE classes and some others: routed experts under `mlp`, dense layers listed by number."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import ConfigValues, MoeFamily


_MLP = llama.LAYER + "mlp."
_EXPERT = _MLP + "experts.{expert}."
ROUTED_NAMES = {
    "router": (_MLP + "gate.weight",),
    "router_bias": (_MLP + "gate.bias",),
    "expert_fc1": tuple(_EXPERT + f"{part}_proj.weight" for part in ("gate", "up")),
    "expert_fc1_bias": tuple(_EXPERT + f"{part}_proj.bias" for part in ("gate", "up")),
    "expert_fc2": (_EXPERT + "down_proj.weight",),
    "expert_fc2_bias": (_EXPERT + "down_proj.bias",),
}


def experts_everywhere(config: ConfigValues, count: str) -> dict[str, Any]:
    """Return the `Architecture` fields of classes like Mixtral: experts in every layer, as wide as a dense network.

    Args:
        config: values of the class's `config.json`.
        count: name of the setting for the number of experts.
    """
    experts = config.whole(count)
    return {
        "num_experts": experts,
        "top_k": config.whole("num_experts_per_tok", most=experts),
        "expert_ffn_size": config.whole("intermediate_size"),
    }


class RoutedFamily(MoeFamily):
    """Base of Qwen's MoE classes: the same settings of routed experts, and the same problems with servers."""

    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """Return the `Architecture` fields that describe routed experts."""
        step, dense = config.whole("decoder_sparse_step", 1), config.values.get("mlp_only_layers", [])
        if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < num_layers for layer in dense):
            raise config.wrong("mlp_only_layers", f"a list of layer numbers, 0 to {num_layers - 1}")
        experts = config.whole("num_experts")
        pattern = tuple((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))
        return {
            "num_experts": experts,
            "top_k": config.whole("num_experts_per_tok", most=experts),
            "expert_ffn_size": config.whole("moe_intermediate_size"),
            "moe_pattern": None if all(pattern) else pattern,
            "norm_topk": config.flag("norm_topk_prob"),
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        """See `MoeFamily.expert_settings`."""
        return {
            "num_experts": arch.num_experts,
            "intermediate_size": arch.ffn_size,
            "moe_intermediate_size": arch.expert_ffn_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(arch.num_layers) if not arch.is_moe_layer(layer)],
            "norm_topk_prob": arch.norm_topk,
            "use_sliding_window": False,
        }
