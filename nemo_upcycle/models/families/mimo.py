"""MiMo: a Qwen2 whose checkpoints also hold layers for multi-token prediction."""

from __future__ import annotations

from nemo_upcycle.models.families import qwen2
from nemo_upcycle.models.families.base import Family


FAMILY = Family(
    title="MiMo",
    hf_class="MiMoForCausalLM",
    model_type="mimo",
    names=qwen2.FAMILY.names,
    defaults=qwen2.FAMILY.defaults,
    spelling={"attention_bias": "qkv_bias"},  # the file says true, but only query, key and value have biases
    has_mtp=True,
    own_settings=("num_nextn_predict_layers",),
    computed_as="Qwen2ForCausalLM",
)
