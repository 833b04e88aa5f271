"""Ministral 3 (text): a Mistral with YaRN. Sequences must end before the position where its scores begin to grow."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, Family


#: Settings stored with the rotary embedding: how fast the scores grow with the position, and the position where the
#: growth begins.
_GROWTH, _BEGINS = "llama_4_scaling_beta", "original_max_position_embeddings"


class _Ministral3(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        scaling = config.values["rope_scaling"] or {}
        if scaling.get("rope_type") != "yarn" or not isinstance(scaling.get(_BEGINS), int):
            raise config.wrong("rope_scaling", f"yarn, with {_BEGINS}")
        others = (_GROWTH, "max_position_embeddings")
        return super().attention(config, num_layers) | {
            "rope_scaling": {name: value for name, value in scaling.items() if name not in others},
            "max_positions": scaling[_BEGINS],
        }


FAMILY = _Ministral3(
    title="Ministral 3",
    hf_class="Ministral3ForCausalLM",
    model_type="ministral3",
    names=llama.NAMES,
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rope_theta": 1e6}
    | {"rms_norm_eps": 1e-5},
    has_window=True,
)
