"""Qwen3.5 and later: gated delta nets in most layers, gated attention in the others, zero-centered norms."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture_parts import DeltaLayers
from nemo_upcycle.models.delta_nets import DELTA_SIZES
from nemo_upcycle.models.families import llama, qwen3
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, FULL, ConfigValues, Family


#: Name in `layer_types` of layers with a gated delta net.
LINEAR = "linear_attention"
_NET = llama.LAYER + "linear_attn."
NAMES = qwen3.NAMES | {
    "delta_in": (*(_NET + "in_proj_qkv.weight",) * 3, *(_NET + f"in_proj_{part}.weight" for part in "zba")),
    "delta_conv": (_NET + "conv1d.weight",) * 3,
    "delta_a": (_NET + "A_log",),
    "delta_dt_bias": (_NET + "dt_bias",),
    "delta_norm": (_NET + "norm.weight",),
    "delta_out": (_NET + "out_proj.weight",),
}
DEFAULTS = COMMON_DEFAULTS | {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "qk_norm": True,
    "zero_centered_norm": True,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
#: In Hugging Face, the norm of a net's output is the only norm that is not zero-centered. In Megatron, this norm is
#: zero-centered, too.
OFFSETS = {"delta_norm": 1.0}


def attention(config: ConfigValues, kinds: list[str] | None, num_layers: int) -> dict[str, Any]:
    """Return the `Architecture` fields in which the layers of these classes differ from Llama's.

    Args:
        config: values of the class's `config.json`.
        kinds: kind of each layer, as in `layer_types`; None if the file does not list the kinds.
        num_layers: L.

    Raises:
        CheckpointError: settings are missing or contradict each other.
    """
    if config.values.get("attn_output_gate", True) is not True:
        raise config.wrong("attn_output_gate", "true or omitted, because every model of the class has this gate")
    interval = config.whole("full_attention_interval")
    kinds = kinds or [FULL if (layer + 1) % interval == 0 else LINEAR for layer in range(num_layers)]
    sizes = {name: config.whole(setting) for name, setting in DELTA_SIZES.items()}
    nets = DeltaLayers(pattern=tuple(kind == LINEAR for kind in kinds), **sizes)
    if nets.num_value_heads % nets.num_key_heads:
        raise config.wrong("linear_num_value_heads", f"a multiple of linear_num_key_heads ({nets.num_key_heads})")
    return {"output_gate": True, "delta": nets if any(nets.pattern) else None}


class _Qwen35(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        return attention(config, self._layer_types(config, num_layers, (LINEAR, FULL)), num_layers)


FAMILY = _Qwen35(
    title="Qwen3.5",
    hf_class="Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    names=NAMES,
    defaults=DEFAULTS,
    hf_offsets=OFFSETS,
    has_partial_rotary=True,
    own_settings=("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
)
