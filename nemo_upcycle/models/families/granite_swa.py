"""GraniteSWA (Granite Swash): a Granite 3 with attention sinks, whose layers differ in windows and positions."""

from __future__ import annotations

import math
from typing import Any

from nemo_upcycle.models.families import granite, llama
from nemo_upcycle.models.families.base import LEARNABLE, ConfigValues, Family, multipliers, zero_filled


#: Setting with the rotary base of each layer; 0 for a layer without positions.
THETAS = "layer_rope_theta"
NAMES = llama.NAMES | {"sinks": (llama.LAYER + "self_attn.sinks",)}
DEFAULTS = granite.DEFAULTS | {"sliding_window": 128}


class GraniteSwa(Family):
    """Base of the classes with sinks."""

    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """See `Family.attention`."""
        windowed = self._windowed(config, num_layers, every=4, first=0)
        theta, sees_all = config.number("rope_theta"), "sliding_window" not in config.values or not any(windowed)
        thetas = config.values.get(THETAS) or [theta] * num_layers
        if not isinstance(thetas, list) or len(thetas) != num_layers or any(one not in (0, theta) for one in thetas):
            expected = f"{num_layers} numbers, {theta:g} or 0, one for each layer"
            raise config.wrong(THETAS, expected, "use another checkpoint")
        heads, factors = config.whole("num_attention_heads"), multipliers(config)
        scale = 1 / math.sqrt(config.whole("head_dim", config.whole("hidden_size") // heads))
        is_plain = factors == dict.fromkeys(factors, 1.0) | {"attention_multiplier": scale}
        return {
            **({} if is_plain else factors),
            **({"sliding_window": None} if sees_all else {"window_pattern": self._pattern(windowed)}),
            **({} if "sinks" in zero_filled(config) else {"softmax_type": LEARNABLE}),
            "rope_pattern": self._pattern(map(bool, thetas)),
        }


FAMILY = GraniteSwa(
    title="GraniteSWA",
    hf_class="GraniteSWAForCausalLM",
    model_type="granite_swa",
    names=NAMES,
    defaults=DEFAULTS | {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    has_multipliers=True,
    has_window=True,
    layer_patterns=("rope_pattern", "window_pattern"),
)
