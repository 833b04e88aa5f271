"""OLMo 2: norms after attention and network instead of before, and norms of query and key over all heads."""

from __future__ import annotations

from nemo_upcycle.models.families import llama, qwen3
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family


NAMES = {role: names for role, names in qwen3.NAMES.items() if role not in ("attention_norm", "ffn_norm")} | {
    "attention_post_norm": (llama.LAYER + "post_attention_layernorm.weight",),
    "ffn_post_norm": (llama.LAYER + "post_feedforward_layernorm.weight",),
}
FAMILY = Family(
    title="OLMo 2",
    hf_class="Olmo2ForCausalLM",
    model_type="olmo2",
    names=NAMES,
    defaults=COMMON_DEFAULTS | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "qk_norm": True},
    pre_norm=False,
    post_norm=True,
    wide_qk_norm=True,
    nemo_module="olmo2",
)
