"""IQuest-Coder: a Llama under a class name of its own."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, Family


class _IQuestCoder(Family):
    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        if "clip_qkv" in config.values:
            raise config.wrong("clip_qkv", "null", "use a checkpoint whose query, key and value are not cut off")
        return super().attention(config, num_layers)


FAMILY = _IQuestCoder(
    title="IQuest-Coder",
    hf_class="IQuestCoderForCausalLM",
    model_type="iquestcoder",
    names=llama.NAMES,
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
    computed_as="LlamaForCausalLM",
)
