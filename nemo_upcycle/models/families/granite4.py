"""Granite 4 without experts and Mamba layers: a Granite 3 whose network is the shared expert of an MoE class."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import FULL, ConfigValues, Family, multipliers
from nemo_upcycle.models.families.granite import DEFAULTS


_MLP = llama.LAYER + "shared_mlp."
_MAMBA = ("chunk_size", "conv_bias", "d_conv", "d_head", "d_state", "expand", "n_groups", "n_heads", "proj_bias")


class _Granite4(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        fix = "use a Granite 4 without Mamba layers and experts, as granite-4.0-micro"
        if config.whole("num_local_experts", 8, least=0):
            raise config.wrong("num_local_experts", "0", fix)
        kinds = config.values.get("layer_types")
        if kinds not in (["attention"] * num_layers, [FULL] * num_layers):  # names in transformers 4 and 5
            raise config.wrong("layer_types", f"attention for each of the {num_layers} layers" if kinds else "it", fix)
        if config.values.get("position_embedding_type") != "rope":
            raise config.wrong("position_embedding_type", "rope", fix)
        return {"ffn_size": config.whole("shared_intermediate_size", 1024)} | multipliers(config)


FAMILY = _Granite4(
    title="Granite 4",
    hf_class="GraniteMoeHybridForCausalLM",
    model_type="granitemoehybrid",
    names=llama.NAMES | {"fc1": (_MLP + "input_linear.weight",) * 2, "fc2": (_MLP + "output_linear.weight",)},
    defaults=DEFAULTS | {"intermediate_size": 1},  # width of the class's experts, which these models lack
    has_multipliers=True,
    # If config.json has the width of shared experts, llama.cpp looks for shared experts in a GraniteMoe, too.
    own_settings=(
        *("shared_intermediate_size", "position_embedding_type", "time_step_limit", "normalization_function"),
        *(f"mamba_{name}" for name in _MAMBA),
    ),
)
