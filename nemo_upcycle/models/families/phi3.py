"""Phi-3, 3.5 and 4-mini: fused matrices, a sliding window, heads that may be rotated in part, LongRoPE."""

from __future__ import annotations

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family


FAMILY = Family(
    title="Phi-3",
    hf_class="Phi3ForCausalLM",
    model_type="phi3",
    names=llama.NAMES
    | {
        "qkv": (llama.LAYER + "self_attn.qkv_proj.weight",) * 3,
        "fc1": (llama.LAYER + "mlp.gate_up_proj.weight",) * 2,
    },
    defaults=COMMON_DEFAULTS
    | {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    has_window=True,
    has_partial_rotary=True,
    nemo_module="phi3mini",
)
