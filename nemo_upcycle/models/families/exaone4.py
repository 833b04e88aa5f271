"""EXAONE 4: norms after attention and network, windows in most layers, positions only in layers with a window.

No MoE class has both of these features: norms after attention and network, and separate norms of query and key for
each head.
"""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import olmo2
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, Family


class _Exaone4(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        if "sliding_window" not in config.values:
            return super().attention(config, num_layers)
        every = 4 if config.values.get("layer_types") else config.whole("sliding_window_pattern", 4)
        windowed = self._pattern(self._windowed(config, num_layers, every))
        return {"window_pattern": windowed, "rope_pattern": windowed}


FAMILY = _Exaone4(
    title="EXAONE 4",
    hf_class="Exaone4ForCausalLM",
    model_type="exaone4",
    names=olmo2.NAMES,
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096}
    | {"qk_norm": True},
    pre_norm=False,
    post_norm=True,
    has_window=True,
    layer_patterns=("window_pattern", "rope_pattern"),
)
