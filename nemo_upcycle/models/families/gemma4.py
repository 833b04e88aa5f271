"""Gemma 4 (text, 12B and 31B): other heads in layers without a window, and a factor on the output of each layer.

The models E2B and E4B are refused, because each of their layers has its own embeddings, and layers share keys and
values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.models.architecture import FAMILIES, Architecture
from nemo_upcycle.models.architecture_parts import GlobalHeads
from nemo_upcycle.models.families import gemma, gemma3, llama
from nemo_upcycle.models.families.base import LOCAL_BASE, ConfigValues, Family
from nemo_upcycle.models.rotary import PROPORTIONAL


#: Class of dense models, and this package's name for the same class with `enable_moe_block`.
DENSE, EXPERTS = "Gemma4ForCausalLM", "Gemma4ForCausalLM (enable_moe_block)"
_OWN_HEADS = "per_layer_config"
#: Setting -> the values that have no effect, and the text that messages show as the expected value.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_size_per_layer_input": ((0,), "0 (layers with their own embeddings, as in E2B, are not supported)"),
    "num_kv_shared_layers": ((None, 0), "0 (layers that share keys and values, as in E2B, are not supported)"),
    "use_bidirectional_attention": ((None, "vision"), "null or vision: text tokens must attend only to earlier ones"),
    "attention_bias": ((None, False), "false"),
}


#: Rotary embeddings of a model whose file has no settings for rotary embeddings.
_UNSAID = {"local_rope_theta": 1e4, "rope_scaling": {"rope_type": PROPORTIONAL}, "rotary_percent": 0.25}


class Gemma4(gemma.Gemma):
    """Gemma 4's class, with or without experts."""

    def of(self, config: Mapping[str, Any]) -> Family:
        """See `Family.of`."""
        family: Family = FAMILIES[EXPERTS if config.get("enable_moe_block") else DENSE]
        return family

    def computes(self, arch: Architecture) -> bool:
        """Return False, because no Megatron model computes this class."""
        return False

    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """See `Family.attention`."""
        for name, (harmless, expected) in _REFUSED.items():
            if config.values.get(name) not in harmless:
                raise config.wrong(name, expected, "use a 12B or 31B, or another checkpoint")
        if "rope_parameters" in config.values and config.values[LOCAL_BASE] is None:
            expected = "one entry for layers with a window, and one for layers without"
            raise config.wrong("rope_parameters", expected, "use another checkpoint")
        windowed = [*self._windowed(config, num_layers, 6)[:-1], False]
        return {
            "window_pattern": self._pattern(windowed),
            **({"local_rope_theta": config.number(LOCAL_BASE)} if "rope_parameters" in config.values else _UNSAID),
            "attention_multiplier": 1.0,
            "embedding_multiplier": config.whole("hidden_size") ** 0.5,
            "global_heads": self._global_heads(config, windowed),
            "keeps_network": True,
        }

    @staticmethod
    def _global_heads(config: ConfigValues, windowed: list[bool]) -> GlobalHeads:
        """Read the heads of layers without a window.

        transformers 5.24 writes a setting for each of these layers. Older releases write one setting for all these
        layers.
        """
        same, heads = config.flag("attention_k_eq_v"), config.whole("num_attention_heads")
        groups = config.whole("num_key_value_heads")
        given = {"head_dim": config.whole("global_head_dim")}
        given |= {"num_key_value_heads": config.values.get("num_global_key_value_heads", groups)} if same else {}
        numbers = [str(layer) for layer, sees in enumerate(windowed) if not sees]
        layers = config.values.get(_OWN_HEADS, dict.fromkeys(numbers, given))
        first = layers.get(numbers[-1], {}) if isinstance(layers, dict) else None
        if not isinstance(first, dict) or layers not in ({}, dict.fromkeys(numbers, first)):
            raise config.wrong(_OWN_HEADS, f"the same in layers {', '.join(numbers)}, and none in other layers")
        inside = ConfigValues(first, f"{config.where}: {_OWN_HEADS}")
        groups, head_dim = inside.whole("num_key_value_heads", groups), config.whole("head_dim")
        if heads % groups:
            raise inside.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        return GlobalHeads(
            head_dim=inside.whole("head_dim", head_dim), num_kv_heads=groups, value_is_key=same
        )  # transformers omits values that are the same as in the other layers


NAMES = {**gemma3.FAMILY.names, "layer_scale": (llama.LAYER + "layer_scalar",)}
DEFAULTS = {
    **{name: value for name, value in gemma3.FAMILY.defaults.items() if name != "zero_centered_norm"},
    **{"sliding_window": 512, "global_head_dim": 512, "hidden_size_per_layer_input": 256, LOCAL_BASE: None},
}
FAMILY = Gemma4(
    title="Gemma 4",
    hf_class=DENSE,
    model_type="gemma4_text",
    names=NAMES,
    defaults=DEFAULTS,
    post_norm=True,
    has_window=True,
    has_partial_rotary=True,
    layer_patterns=("window_pattern",),
    has_multipliers=True,
)
