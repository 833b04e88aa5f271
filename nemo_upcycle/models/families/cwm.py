"""CWM: a Llama whose attention sees a window in all layers except 0, 4, 8 and so on."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, Family


#: Scaling of the rotary frequencies if `config.json` has none.
_SCALING = {
    **{"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8192},
}


class _Cwm(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        is_silent = not config.values["rope_scaling"] and "rope_parameters" not in config.values
        windowed = self._windowed(config, num_layers, every=4, first=0)
        sees_all = not any(windowed) or "sliding_window" not in config.values
        return {
            **({"rope_scaling": _SCALING} if is_silent else {}),
            **({"sliding_window": None} if sees_all else {"window_pattern": self._pattern(windowed)}),
        }


FAMILY = _Cwm(
    title="CWM",
    hf_class="CwmForCausalLM",
    model_type="cwm",
    names=llama.NAMES,
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 1e6}
    | {"rms_norm_eps": 1e-5, "sliding_window": 8192},
    has_window=True,
    layer_patterns=("window_pattern",),
)
