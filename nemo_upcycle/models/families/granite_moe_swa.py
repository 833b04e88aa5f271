"""GraniteMoeSWA: a GraniteMoe with attention sinks, whose layers differ in windows and positions.

Without sinks in the model, the sinks of the class are switched off.
"""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import granite_moe, granite_moe_shared, granite_swa, llama
from nemo_upcycle.models.families.base import (
    FULL,
    LEARNABLE,
    WINDOW,
    ZERO_FILLED,
    ConfigValues,
    MoeFamily,
    zero_filled,
)
from nemo_upcycle.models.families.routed import experts_everywhere


_MOE = llama.LAYER + "block_sparse_moe."
#: Value of a sink, which enters the softmax beside the scores. The value is so low that the sink's share is zero.
_NO_SINK = -1e4


class _GraniteMoeSwa(granite_swa.GraniteSwa, granite_moe.GraniteMoe):
    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        has_no_bias = {"attention_out_bias": False} if "attention_out_bias" in zero_filled(config) else {}
        shared = {"shared_ffn_size": config.whole("shared_intermediate_size", 0, least=0)}
        return experts_everywhere(config, "num_local_experts") | shared | has_no_bias

    def limits(self, arch: Architecture) -> dict[str, bool]:
        return MoeFamily.limits(self, arch) | {
            "a bias of the attention's output alone": arch.attention_out_bias and not arch.qkv_bias,
            "dense layers": arch.moe_pattern is not None,
            "expert weights that do not sum to one": not arch.norm_topk,
            "a rotary base of its own in layers with windows": arch.local_rope_theta is not None,
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        layers = range(arch.num_layers)
        return super().expert_settings(arch) | {
            "attention_bias": arch.qkv_bias,
            "shared_intermediate_size": arch.shared_ffn_size,
            "sliding_window": arch.sliding_window or arch.max_positions,  # required, even if no layer has a window
            "layer_types": [FULL if arch.window_of(layer) is None else WINDOW for layer in layers],
            granite_swa.THETAS: [
                arch.rope_theta if turns else 0 for turns in arch.rope_pattern or (True,) * arch.num_layers
            ],
            ZERO_FILLED: [name for name, is_absent in self._absent(arch).items() if is_absent],
        }

    @staticmethod
    def _absent(arch: Architecture) -> dict[str, bool]:
        """Return whether the model lacks a part of the class: role of the part -> answer."""
        return {
            "attention_out_bias": arch.qkv_bias and not arch.attention_out_bias,
            "sinks": arch.softmax_type != LEARNABLE,
        }

    def constants(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the sinks of all heads, and the biases of the attention output, if the model lacks them."""
        sizes = {"attention_out_bias": (arch.hidden_size,), "sinks": (arch.num_heads,)}
        absent = [role for role, is_absent in self._absent(arch).items() if is_absent]
        shapes = {name: sizes[role] for role in absent for name in self.names[role]}
        return {name.format(layer=layer): shape for layer in range(arch.num_layers) for name, shape in shapes.items()}


FAMILY = _GraniteMoeSwa(
    title="GraniteMoeSWA",
    hf_class="GraniteMoeSWAForCausalLM",
    model_type="granitemoe_swa",
    names={
        **granite_moe_shared.FAMILY.names,
        "sinks": granite_swa.NAMES["sinks"],
        "router": (_MOE + "router.weight",),
        "expert_fc1": (_MOE + "experts.gate_up_proj[{expert}]",) * 2,
        "expert_fc2": (_MOE + "experts.down_proj[{expert}]",),
    },
    defaults=granite_swa.DEFAULTS,
    has_multipliers=True,
    has_attention_bias=True,
    has_window=True,
    layer_patterns=("rope_pattern", "window_pattern"),
    constant_values={"sinks": _NO_SINK},
    no_parent_because="whose experts lie in one tensor",
)
