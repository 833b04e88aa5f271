"""Settings of a Megatron model that decide what it computes: do they fit the spec and the dense checkpoint?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.activation import activation_of
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.rotary import same_frequencies
from nemo_upcycle.spec import UpcycleSpec, check_capacity


#: Settings of Megatron's that change the function and leave every shape as it is. No known parent has another value.
_PLAIN: dict[str, Any] = {
    "normalization": "RMSNorm",
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "mrope_section": None,
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "multi_latent_attention": False,
}
#: How every known parent is told positions; NeMo has these settings in its config, Megatron in its model alone.
_POSITIONS: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,  # 1 is as good
}


def check_spec(config: Any, spec: UpcycleSpec) -> None:
    """Check that a model's configuration is what a spec asks for.

    Args:
        config: Megatron's or NeMo's, built or as a `run.Config`.
        spec: what the model is to be made by.

    Raises:
        SpecError: they disagree, or the configuration makes a router that no spec can be exact with.
    """
    scaling = None if spec.routed_scaling_factor == 1 else spec.routed_scaling_factor
    wanted: dict[str, Any] = {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.top_k,
        "moe_router_pre_softmax": spec.router_order == "softmax_topk",
        "moe_router_score_function": spec.router_score,
        "moe_router_topk_scaling_factor": scaling,
        "moe_router_enable_expert_bias": False,  # the spec says nothing of it
        "moe_router_num_groups": None,  # choosing among groups of experts would tear copies apart
        "moe_apply_probs_on_input": False,  # the network is not linear in its input
        "moe_router_force_load_balancing": False,  # random routing, for benchmarks
    }
    for name, value in wanted.items():
        got = getattr(config, name, None)
        if got != value and not (not got and not value) and not (value is None and got == 1):
            raise SpecError(
                f"model.config.{name}", got=got, expected=f"{value} (from the UpcycleSpec)", fix="make them agree"
            )
    for name, value in _POSITIONS.items():
        if (got := getattr(config, name, value)) not in (value, value or 1):
            raise SpecError(
                f"model.config.{name}", got=got, expected=f"{value}, as in every dense parent", fix="leave it at that"
            )
    _check_routing_type(config, spec)
    capacity = getattr(config, "moe_expert_capacity_factor", None)
    pad = bool(getattr(config, "moe_pad_expert_input_to_capacity", False))
    # Megatron takes a negative factor for none.
    check_capacity(None if capacity is None or capacity < 0 else capacity, pad, spec.num_experts, spec.top_k)
    if (routing := getattr(config, "moe_router_load_balancing_type", None)) == "sinkhorn":
        raise SpecError(
            "model.config.moe_router_load_balancing_type",
            got=routing,
            expected="a type that leaves the router's scores alone",
            fix="use aux_loss or none",
        )
    frequency, layers = getattr(config, "moe_layer_freq", 1), config.num_layers
    pattern = [layer % frequency == 0 for layer in range(layers)] if isinstance(frequency, int) else frequency
    if (want := spec.moe_pattern(layers)) != tuple(map(bool, pattern)):
        raise SpecError(
            "model.config.moe_layer_freq",
            got=frequency if isinstance(frequency, int) else list(frequency),
            expected=f"{[int(is_moe) for is_moe in want]} (moe_layers={spec.moe_layers})",
            fix="make them agree",
        )


def _check_routing_type(config: Any, spec: UpcycleSpec) -> None:
    """Check that the experts of one copy are chosen together: in 16 bits the logits of two copies can be equal."""
    is_recipe = hasattr(config, "__fn_or_cls__")  # then the type comes later, from the trainer's precision plugin
    in_float32 = config.params_dtype is torch.float32 and not (config.bf16 or config.fp16 or is_recipe)
    if spec.needs_float32_routing and not in_float32 and (got := config.moe_router_dtype) not in ("fp32", "fp64"):
        raise SpecError(
            "model.config.moe_router_dtype",
            got=got,
            expected=f"fp32 or fp64 with granularity={spec.granularity}: in 16 bits top-k mixes copies",
            fix="set it to fp32",
        )


def check_model(model: Any, made: Architecture) -> None:
    """Check that a built model has the settings that a checkpoint's architecture asks for.

    Args:
        model: a Megatron `GPTModel`.
        made: the architecture that it is to have.

    Raises:
        CheckpointError: it is of other shapes, or would compute another function with the same weights.
    """
    config, rotary = model.config, getattr(model, "rotary_pos_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    wanted: dict[str, Any] = {
        "num_layers": made.num_layers,
        "hidden_size": made.hidden_size,
        "ffn_hidden_size": made.ffn_size,
        "num_attention_heads": made.num_heads,
        "num_query_groups": made.num_kv_heads,
        "kv_channels": made.head_dim,
        "gated_linear_unit": made.gated,
        "layernorm_epsilon": made.norm_eps,
        "layernorm_zero_centered_gamma": made.zero_centered_norm,
    }
    if config.num_moe_experts:
        wanted["moe_ffn_hidden_size"] = made.expert_ffn_size or made.ffn_size
        wanted["moe_shared_expert_intermediate_size"] = made.shared_ffn_size or None
    checks: list[tuple[str, Any, Any]] = [(name, getattr(config, name), value) for name, value in wanted.items()]
    # Before all others: a model with other position embeddings may have no rotary ones.
    for name, value in _POSITIONS.items():
        got = getattr(model, name, getattr(rotary, name, value))
        checks.append((name, value if got == 1 else got, value))
    checks += [(name, getattr(config, name, value) or value, value) for name, value in _PLAIN.items()]
    if config.softmax_scale and not math.isclose(config.softmax_scale, made.head_dim**-0.5, rel_tol=1e-6):
        checks.append(("softmax_scale", config.softmax_scale, f"None or {made.head_dim**-0.5:.6g}"))
    # What follows changes the function unnoticed. NeMo scales the rotary frequencies outside of its config.
    checks.append(("activation_func", activation_of(config.activation_func), made.activation))
    if frequencies is not None and not frequencies.is_meta and not same_frequencies(frequencies, made):
        got = f"rotary_base {model.rotary_base:g}, frequencies down to {float(frequencies[-1]):.4g}"
        expected = f"rope_theta {made.rope_theta:g}, rope_scaling {made.rope_scaling}"
        checks.append(("rotary_base and RoPE scaling", got, expected))
    for name, got, value in checks:
        if got != value:
            raise CheckpointError(
                f"model.config.{name}",
                got=got,
                expected=f"{value}, as in the dense checkpoint",
                fix="use the dense model's own configuration",
            )


def changed_by(model: Any, dense: Architecture, spec: UpcycleSpec | None) -> Iterator[str]:
    """Yield why a model whose weights are exact is not: experts that overflow drop tokens, attention sees others."""
    config = model.config
    factor = config.moe_expert_capacity_factor
    if spec and factor is not None and factor >= 0 and factor * spec.top_k < spec.num_experts:
        yield f"moe_expert_capacity_factor={factor} drops the tokens of experts that overflow"
    # Megatron counts the tokens before the current one (NeMo's import forgets that), Hugging Face that one, too.
    tokens, window = min(dense.max_positions, model.max_sequence_length), config.window_size
    seen = window[0] + 1 if window and window[0] >= 0 else tokens
    wanted = dense.sliding_window or tokens
    if min(seen, tokens) != min(wanted, tokens) or (seen < tokens and config.window_attn_skip_freq):
        exact = (wanted - 1, 0) if dense.sliding_window else None
        yield f"window_size={window} is not the dense model's attention: {exact} in every layer would be"
    # Gemma multiplies its embedding by the root of D; NeMo's model class does so, Megatron's has no setting for it.
    scales = any(base.__name__ == "EmbeddingScalingMixin" for base in type(getattr(model, "embedding", None)).__mro__)
    if model.pre_process and scales is not dense.scaled_embedding:
        done = ("does not multiply", "multiplies")[scales]
        yield f"the model {done} its embedding by sqrt(hidden_size), unlike the dense one: see NeMo's GemmaModel"
