"""OLMo 3: OLMo 2's norms, and windows in most layers. Only layers without a window scale their positions."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import olmo2
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, LOCAL_BASE, ConfigValues, Family


class _Olmo3(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        windowed = self._windowed(config, num_layers, every=4)
        if not any(windowed):
            return {"sliding_window": None}
        base = config.number(LOCAL_BASE if config.values[LOCAL_BASE] else "rope_theta")
        own = base if config.values["rope_scaling"] or base != config.number("rope_theta") else None
        return {"window_pattern": self._pattern(windowed), "local_rope_theta": own}


FAMILY = _Olmo3(
    title="OLMo 3",
    hf_class="Olmo3ForCausalLM",
    model_type="olmo3",
    names=olmo2.NAMES,
    defaults=COMMON_DEFAULTS
    | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096, "qk_norm": True}
    | {LOCAL_BASE: 0},  # 0: layers with a window have the same base as the others
    pre_norm=False,
    post_norm=True,
    wide_qk_norm=True,
    has_window=True,
    layer_patterns=("window_pattern",),
)
