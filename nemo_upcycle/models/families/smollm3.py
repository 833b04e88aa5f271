"""SmolLM3: a Llama without positions in every fourth layer."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, Family


class _SmolLm3(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        said = config.values.get("no_rope_layers")  # 1 for a layer with positions
        if said is None:
            every = config.whole("no_rope_layer_interval", 4)
            said = [int((layer + 1) % every != 0) for layer in range(num_layers)]
        if not isinstance(said, list) or len(said) != num_layers or any(turns not in (0, 1) for turns in said):
            raise config.wrong("no_rope_layers", f"{num_layers} numbers, 0 or 1, one for each layer")
        return super().attention(config, num_layers) | {"rope_pattern": self._pattern(map(bool, said))}


FAMILY = _SmolLm3(
    title="SmolLM3",
    hf_class="SmolLM3ForCausalLM",
    model_type="smollm3",
    names=llama.NAMES,
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True},
    layer_patterns=("rope_pattern",),
    own_settings=("no_rope_layers", "no_rope_layer_interval"),
)
