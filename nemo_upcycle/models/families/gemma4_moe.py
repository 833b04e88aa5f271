"""Gemma 4 with experts: a layer keeps the dense network beside the experts, and a norm follows each of the two.

A layer adds N(N1(f(x)) + N2(sum of p f_e(x2))). Here f is the dense network, N is the norm after f in the parent, and
N1 and N2 are new norms. Upcycling sets the weights of N1 and N2 to one, and uses the same norm before the experts as
before f. It makes the experts copies of f whose combine weights sum to one. Then both terms are f(x) / rms(f(x)). N of
the sum of the two terms is N(f(x)), because a norm ignores the scale of its input. Only `rms_norm_eps` changes the
result, because N1 and N2 add this number again. Experts and network both get gradients.
"""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import gemma4, llama
from nemo_upcycle.models.families.base import ACTIVATIONS, FULL, WINDOW, ConfigValues, MoeFamily


_ROUTER = llama.LAYER + "router."
_NORM = llama.LAYER + "{kind}_feedforward_layernorm{number}.weight"


def _norm(kind: str, number: str = "") -> tuple[str]:
    return (_NORM.replace("{kind}", kind).replace("{number}", number),)


class _Gemma4Moe(gemma4.Gemma4, MoeFamily):
    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        experts = config.whole("num_experts")
        return {
            "num_experts": experts,
            "top_k": config.whole("top_k_experts", most=experts),
            "expert_ffn_size": config.whole("moe_intermediate_size"),
            "shared_ffn_size": config.whole("intermediate_size"),
        }

    def limits(self, arch: Architecture) -> dict[str, bool]:
        return super().limits(arch) | {
            "layers of Gemma 4": False,
            "layers that are not Gemma 4's": not arch.keeps_network,
            "shared experts beside the network that is kept": arch.shared_ffn_size != arch.ffn_size,
            "dense layers": arch.moe_pattern is not None,
            "expert weights that do not sum to one": not arch.norm_topk,
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        heads, layers = arch.global_heads, range(arch.num_layers)
        assert heads
        own = {"head_dim": heads.head_dim, "num_key_value_heads": heads.num_kv_heads}
        full = {"rope_type": "default"} | (arch.rope_scaling or {}) | {"rope_theta": arch.rope_theta}
        return {
            "enable_moe_block": True,
            "num_experts": arch.num_experts,
            "top_k_experts": arch.top_k,
            "intermediate_size": arch.ffn_size,
            "moe_intermediate_size": arch.expert_ffn_size,
            "hidden_activation": next(name for name, kind in ACTIVATIONS.items() if kind == arch.activation),
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": heads.value_is_key,
            "global_head_dim": heads.head_dim,
            "num_global_key_value_heads": heads.num_kv_heads,
            "per_layer_config": {str(layer): own for layer in layers if arch.window_of(layer) is None},
            "sliding_window": arch.sliding_window,
            "layer_types": [FULL if arch.window_of(layer) is None else WINDOW for layer in layers],
            "tie_word_embeddings": arch.tied_embeddings,
            "rope_parameters": {
                FULL: full | {"partial_rotary_factor": arch.rotary_percent},
                WINDOW: {"rope_type": "default", "rope_theta": arch.local_rope_theta},
            },
        }

    def constants(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the norms after network and experts, and the factors before the router and after each expert."""
        width, experts = (arch.hidden_size,), (arch.num_experts or 0,)
        shapes = {_norm("post", f"_{number}")[0]: width for number in (1, 2)}
        return self.in_moe_layers(shapes | {_ROUTER + "scale": width, _ROUTER + "per_expert_scale": experts}, arch)


_DENSE = gemma4.NAMES
FAMILY = _Gemma4Moe(
    title="Gemma 4 with experts",
    hf_class=gemma4.EXPERTS,
    saved_as=gemma4.DENSE,
    model_type="gemma4_text",
    names={
        **{role: names for role, names in _DENSE.items() if role not in ("fc1", "fc2")},
        "shared_fc1": _DENSE["fc1"],
        "shared_fc2": _DENSE["fc2"],
        "kept_ffn_norm": _norm("pre"),
        "ffn_norm": _norm("pre", "_2"),
        "router": (_ROUTER + "proj.weight",),
        "expert_fc1": (llama.LAYER + "experts.gate_up_proj[{expert}]",) * 2,
        "expert_fc2": (llama.LAYER + "experts.down_proj[{expert}]",),
    },
    defaults=gemma4.DEFAULTS,
    post_norm=True,
    has_window=True,
    has_partial_rotary=True,
    layer_patterns=("window_pattern",),
    has_multipliers=True,
    constant_values=dict.fromkeys(("layernorm_1.weight", "layernorm_2.weight", "scale"), 1.0),
    no_parent_because="whose experts lie in one tensor",
)
