"""Nemotron-H: Mamba-2, attention without positions and ungated networks, each as a separate layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.models.architecture_parts import MambaLayers
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, Family


_LAYER = "backbone.layers.{layer}."
_MIXER = _LAYER + "mixer."
_KINDS = {"mamba": "M", "attention": "*", "mlp": "-"}
#: Defaults of transformers' configuration class. Megatron-Core's layers support no other values.
_FIXED = {
    "conv_kernel": MambaLayers.conv_size,
    "rms_norm_eps": 1e-5,  # for the norm in a Mamba layer
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "num_nextn_predict_layers": 0,
    **dict.fromkeys(("use_bias", "mamba_proj_bias", "mlp_bias", "attention_bias"), False),
}


class _NemotronH(Family):
    def mamba(self, config: ConfigValues) -> MambaLayers:
        pattern = _pattern(config.values)
        if "M" not in pattern or not set(pattern) <= {*_KINDS.values()}:
            raise config.wrong(
                "hybrid_override_pattern" if "layers_block_type" not in config.values else "layers_block_type",
                "Mamba-2 layers (M), attention (*) and networks (-)",
                "use a checkpoint that has only these layers",
            )
        limit = config.values.get("time_step_limit", [])
        if isinstance(limit, list) and any(isinstance(step, float) and 0 < step < 1e300 for step in limit):
            raise config.wrong("time_step_limit", "none, because Megatron-Core has none", "use another checkpoint")
        for key, value in _FIXED.items():
            if config.values.get(key, value) != value:
                raise config.wrong(key, f"{value}, as in Megatron-Core's layers", "use another checkpoint")
        sizes = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
        heads, head_dim, groups, state_size = (config.whole(name) for name in sizes)
        if heads % groups:
            raise config.wrong("n_groups", f"a divisor of mamba_num_heads ({heads})")
        return MambaLayers(
            pattern=pattern,
            num_heads=heads,
            head_dim=head_dim,
            num_groups=groups,
            state_size=state_size,
        )


def _pattern(config: Mapping[str, Any]) -> str:
    """Read the kind of each layer from a pattern or from transformers 5's list of kinds; "" if both are missing."""
    pattern, kinds = config.get("hybrid_override_pattern"), config.get("layers_block_type")
    if pattern is None and isinstance(kinds, list):
        return "".join(_KINDS.get(kind, "?") if isinstance(kind, str) else "?" for kind in kinds)
    return pattern if isinstance(pattern, str) else ""


FAMILY = _NemotronH(
    title="Nemotron-H",
    hf_class="NemotronHForCausalLM",
    model_type="nemotron_h",
    names={
        "embedding": ("backbone.embeddings.weight",),
        "final_norm": ("backbone.norm_f.weight",),
        "output": ("lm_head.weight",),
        **dict.fromkeys(("attention_norm", "ffn_norm", "mamba_norm"), (_LAYER + "norm.weight",)),
        "qkv": tuple(_MIXER + f"{part}_proj.weight" for part in "qkv"),
        "attention_out": (_MIXER + "o_proj.weight",),
        "fc1": (_MIXER + "up_proj.weight",) * 2,
        "fc2": (_MIXER + "down_proj.weight",),
        "mamba_in": (_MIXER + "in_proj.weight",) * 5,
        "mamba_conv": (_MIXER + "conv1d.weight",) * 3,
        "mamba_conv_bias": (_MIXER + "conv1d.bias",) * 3,
        "mamba_a": (_MIXER + "A_log",),
        "mamba_d": (_MIXER + "D",),
        "mamba_dt_bias": (_MIXER + "dt_bias",),
        "mamba_gated_norm": (_MIXER + "norm.weight",),
        "mamba_out": (_MIXER + "out_proj.weight",),
    },
    defaults=COMMON_DEFAULTS
    | {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128}
    | {"max_position_embeddings": 4096, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8}
    | {"ssm_state_size": 128},
    spelling={
        "mlp_hidden_act": "hidden_act",
        "layer_norm_epsilon": "rms_norm_eps",
        "attention_head_dim": "head_dim",
    },
    gated=False,
)
