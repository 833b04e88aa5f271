"""GraniteMoeSWA: a GraniteMoe whose layers differ in windows and positions. Its attention sinks are switched off."""

from __future__ import annotations

import math
from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import granite_moe, granite_moe_shared, llama
from nemo_upcycle.models.families.base import (
    FULL,
    WINDOW,
    ZERO_FILLED,
    ConfigValues,
    MoeFamily,
    multipliers,
    zero_filled,
)
from nemo_upcycle.models.families.granite import DEFAULTS
from nemo_upcycle.models.families.routed import experts_everywhere


_MOE = llama.LAYER + "block_sparse_moe."
_SINKS = "self_attn.sinks"
#: Value of a sink, which enters the softmax beside the scores. The value is so low that the sink's share is zero.
_NO_SINK = -1e4
_THETAS = "layer_rope_theta"


class _GraniteMoeSwa(granite_moe.GraniteMoe):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        windowed = self._windowed(config, num_layers, every=4, first=0)
        theta, sees_all = config.number("rope_theta"), "sliding_window" not in config.values or not any(windowed)
        thetas = config.values.get(_THETAS) or [theta] * num_layers
        if not isinstance(thetas, list) or len(thetas) != num_layers or any(one not in (0, theta) for one in thetas):
            expected = f"{num_layers} numbers, {theta:g} or 0, one for each layer"
            raise config.wrong(_THETAS, expected, "use another checkpoint")
        heads, factors = config.whole("num_attention_heads"), multipliers(config)
        scale = 1 / math.sqrt(config.whole("head_dim", config.whole("hidden_size") // heads))
        is_plain = factors == dict.fromkeys(factors, 1.0) | {"attention_multiplier": scale}
        return {
            **({} if is_plain else factors),
            **({"sliding_window": None} if sees_all else {"window_pattern": self._pattern(windowed)}),
            "rope_pattern": self._pattern(map(bool, thetas)),
        }

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
            _THETAS: [arch.rope_theta if turns else 0 for turns in arch.rope_pattern or (True,) * arch.num_layers],
            ZERO_FILLED: ["attention_out_bias"] if arch.qkv_bias and not arch.attention_out_bias else [],
        }

    def constants(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the sinks of all heads, and the biases of the attention output that the model lacks."""
        shapes: dict[str, tuple[int, ...]] = {llama.LAYER + _SINKS: (arch.num_heads,)}
        if arch.qkv_bias and not arch.attention_out_bias:
            shapes |= dict.fromkeys(self.names["attention_out_bias"], (arch.hidden_size,))
        return {name.format(layer=layer): shape for layer in range(arch.num_layers) for name, shape in shapes.items()}


FAMILY = _GraniteMoeSwa(
    title="GraniteMoeSWA",
    hf_class="GraniteMoeSWAForCausalLM",
    model_type="granitemoe_swa",
    names={
        **granite_moe_shared.FAMILY.names,
        "router": (_MOE + "router.weight",),
        "expert_fc1": (_MOE + "experts.gate_up_proj[{expert}]",) * 2,
        "expert_fc2": (_MOE + "experts.down_proj[{expert}]",),
    },
    defaults=DEFAULTS | {"sliding_window": 128},
    has_multipliers=True,
    has_attention_bias=True,
    has_window=True,
    layer_patterns=("rope_pattern", "window_pattern"),
    constant_values={_SINKS: _NO_SINK},
    no_parent_because="whose experts lie in one tensor",
)
