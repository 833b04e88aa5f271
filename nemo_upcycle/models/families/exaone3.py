"""EXAONE 3.0 and 3.5: a Llama with other names for tensors and settings."""

from __future__ import annotations

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family


_LAYER = "transformer.h.{layer}."
_ATTENTION, _MLP = _LAYER + "attn.attention.", _LAYER + "mlp."
FAMILY = Family(
    title="EXAONE 3",
    hf_class="ExaoneForCausalLM",
    model_type="exaone",
    names={
        "embedding": ("transformer.wte.weight",),
        "final_norm": ("transformer.ln_f.weight",),
        "output": llama.NAMES["output"],
        "attention_norm": (_LAYER + "ln_1.weight",),
        "qkv": tuple(_ATTENTION + f"{part}_proj.weight" for part in "qkv"),
        "attention_out": (_ATTENTION + "out_proj.weight",),
        "ffn_norm": (_LAYER + "ln_2.weight",),
        "fc1": (_MLP + "c_fc_0.weight", _MLP + "c_fc_1.weight"),
        "fc2": (_MLP + "c_proj.weight",),
    },
    defaults=COMMON_DEFAULTS
    | {"num_key_value_heads": 8, "max_position_embeddings": 4096, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
    spelling={
        "num_layers": "num_hidden_layers",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
    computed_as="LlamaForCausalLM",
)
