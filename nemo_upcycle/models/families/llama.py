"""Llama 1 to 3, and every model that is saved as a Llama (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family


LAYER = "model.layers.{layer}."
#: Tensors of every Llama-like class. A network without a gate has only the up projection.
NAMES = {
    "embedding": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "output": ("lm_head.weight",),
    "attention_norm": (LAYER + "input_layernorm.weight",),
    "qkv": tuple(LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"),
    "qkv_bias": tuple(LAYER + f"self_attn.{part}_proj.bias" for part in "qkv"),
    "attention_out": (LAYER + "self_attn.o_proj.weight",),
    "attention_out_bias": (LAYER + "self_attn.o_proj.bias",),
    "ffn_norm": (LAYER + "post_attention_layernorm.weight",),
    "fc1": tuple(LAYER + f"mlp.{part}_proj.weight" for part in ("gate", "up")),
    "fc1_bias": tuple(LAYER + f"mlp.{part}_proj.bias" for part in ("gate", "up")),
    "fc2": (LAYER + "mlp.down_proj.weight",),
    "fc2_bias": (LAYER + "mlp.down_proj.bias",),
}
FAMILY = Family(
    title="Llama",
    hf_class="LlamaForCausalLM",
    model_type="llama",
    names=NAMES,
    defaults=COMMON_DEFAULTS | {"max_position_embeddings": 2048},
    nemo_module="llama",
)
