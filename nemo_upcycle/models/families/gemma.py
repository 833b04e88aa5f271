"""Gemma 1: GEGLU, norms that store their distance from one, an embedding multiplied by sqrt(D)."""

from __future__ import annotations

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import ACTIVATIONS, COMMON_DEFAULTS, TANH_GELU, ConfigValues, Family


class Gemma(Family):
    """Base of the Gemma classes."""

    def activation(self, config: ConfigValues) -> str:
        """Read `hidden_activation`. If it is missing, read `hidden_act`.

        The first published configs have `gelu` in `hidden_act`, but mean the tanh form of GELU.
        """
        key = "hidden_activation" if "hidden_activation" in config.values else "hidden_act"
        return config.choice(key, ACTIVATIONS, f"set it to {TANH_GELU}, with which Gemma was trained")


FAMILY = Gemma(
    title="Gemma",
    hf_class="GemmaForCausalLM",
    model_type="gemma",
    names=llama.NAMES,
    defaults=COMMON_DEFAULTS
    | {"hidden_act": TANH_GELU, "tie_word_embeddings": True, "num_key_value_heads": 16, "head_dim": 256}
    | {"max_position_embeddings": 8192, "zero_centered_norm": True, "scaled_embedding": True},
    nemo_module="gemma",
)
