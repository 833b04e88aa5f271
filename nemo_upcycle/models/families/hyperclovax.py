"""HyperCLOVA X (SEED Think): a Granite that multiplies its logits. It may have norms after attention and network."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import granite, llama
from nemo_upcycle.models.families.base import ConfigValues, Family


class _HyperClovaX(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        heads, norms = config.whole("num_attention_heads"), config.flag("use_post_norm")
        scale = config.whole("head_dim", config.whole("hidden_size") // heads) ** -0.5
        values = config.values | {"attention_multiplier": config.values.get("attention_multiplier", scale)}
        factors = super().attention(ConfigValues(values, config.where), num_layers)
        factors["logits_scaling"] = 1 / factors["logits_scaling"]
        is_plain = factors == dict.fromkeys(factors, 1.0) | {"attention_multiplier": scale}
        return {"post_norm": norms} | ({} if is_plain else factors)

    def computes(self, arch: Architecture) -> bool:
        """Return whether a model needs this class: it has multipliers, and norms after attention and network."""
        return arch.attention_multiplier is not None and super().computes(arch)


FAMILY = _HyperClovaX(
    title="HyperCLOVA X",
    hf_class="HyperCLOVAXForCausalLM",
    model_type="hyperclovax",
    names=llama.NAMES
    | {
        "attention_post_norm": (llama.LAYER + "post_norm1.weight",),
        "ffn_post_norm": (llama.LAYER + "post_norm2.weight",),
    },
    defaults={name: value for name, value in granite.DEFAULTS.items() if name != "attention_multiplier"}
    | {"use_post_norm": True},
    post_norm=True,
    has_multipliers=True,
    own_settings=("use_post_norm",),
)
