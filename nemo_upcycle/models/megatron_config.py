"""Translate architecture and spec to and from Megatron's and NeMo's settings, and check the settings of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.init.calibration_file import require_files
from nemo_upcycle.models.activation import activation_of
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.architecture_parts import MambaLayers
from nemo_upcycle.models.balancing import check_balancing
from nemo_upcycle.models.config_fields import check_fields
from nemo_upcycle.models.delta_nets import gate_fields, gates_of, wrong_gates
from nemo_upcycle.models.hybrid import HybridLayers, hybrid_of, hybrid_pattern
from nemo_upcycle.models.layer_settings import (
    DECODER,
    layer_fields,
    layer_freq,
    layer_pattern,
    layers_with,
    no_rope,
    rope_pattern,
    window_fields,
    wrong_layers,
)
from nemo_upcycle.models.rotary import attention_factor, factor_of, same_frequencies
from nemo_upcycle.spec import UpcycleSpec, find_router_kind
from nemo_upcycle.utils.validation import check_capacity


#: Field of an `Architecture` -> Megatron's and NeMo's setting, for the fields that every block has.
_BLOCK = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "ffn_hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "gated": "gated_linear_unit",
    "norm_eps": "layernorm_epsilon",
    "zero_centered_norm": "layernorm_zero_centered_gamma",
    "qk_norm": "qk_layernorm",
}
#: The same table for all fields. Only NeMo has the setting for `tied_embeddings`.
FIELDS = _BLOCK | {
    "tied_embeddings": "share_embeddings_and_output_weights",
    "activation": "activation_func",
    "rope_pattern": "no_rope_freq",
    "qkv_bias": "add_qkv_bias",
    "ffn_bias": "add_bias_linear",
    "num_experts": "num_moe_experts",
    "top_k": "moe_router_topk",
    "expert_ffn_size": "moe_ffn_hidden_size",
    "shared_ffn_size": "moe_shared_expert_intermediate_size",
    "moe_pattern": "moe_layer_freq",
}
_BIASES = ("qkv_bias", "ffn_bias")
#: Field of `MambaLayers` -> Megatron's setting.
_MAMBA = {
    "num_heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "num_groups": "mamba_num_groups",
    "state_size": "mamba_state_dim",
}
_SHAPES = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "qk_norm")
#: Fields in which a recipe must agree with the dense model that it starts from.
SIZES = (*_SHAPES, "rotary_percent", "rope_pattern", "softmax_type", *DECODER)


def require_buildable(arch: Architecture, *, hybrid: bool = False) -> None:
    """Check that a GPTModel, or Megatron-Core's HybridModel, can have the layers of an architecture.

    Raises:
        CheckpointError: the model class lacks such layers.
    """
    if arch.mamba and not hybrid:
        raise CheckpointError(
            arch.hf_class or "The model",
            kind="refused",
            got="has Mamba layers (M), which need a HybridModel and cannot be read from a Megatron checkpoint",
            fix="upcycle its Hugging Face folder into a HybridModel in Megatron-Bridge",
        )
    arch.require_trained()
    special = {
        "norms after attention and network": arch.post_norm,
        "norms of query and key over all heads": arch.wide_qk_norm,
        "layers without positions": arch.rope_pattern is not None,
        "attention sinks": arch.softmax_type != "vanilla",
        "a window in some layers": arch.window_pattern is not None,
        "multipliers": arch.attention_multiplier is not None,
        "YaRN, two rotary embeddings, or attention with a gate": arch.scales_in_layers or arch.output_gate,
    }
    if hybrid and (got := [what for what, holds in special.items() if holds]):
        raise CheckpointError(
            arch.hf_class or "The model",
            kind="refused",
            got=f"has {', '.join(got)}, which a HybridModel cannot have",
            fix="omit hybrid_layer_pattern: a GPTModel can have them",
        )


def megatron_fields(arch: Architecture, *, hybrid: bool = False) -> dict[str, Any]:
    """Return the settings of Megatron's `TransformerConfig` for an architecture, except for the activation.

    Args:
        arch: the architecture.
        hybrid: whether to build a HybridModel, in which attention and network are separate layers.

    Raises:
        CheckpointError: see `require_buildable`.

    Example:
        >>> TransformerConfig(**megatron_fields(arch), activation_func=silu)  # doctest: +SKIP
    """
    require_buildable(arch, hybrid=hybrid)
    fields = (
        {FIELDS[name]: getattr(arch, name) for name in (*_BLOCK, *_BIASES)} | router_fields(arch) | gate_fields(arch)
    )
    fields["normalization"] = "RMSNorm"
    if arch.attention_multiplier is not None:
        fields["softmax_scale"] = arch.attention_multiplier
    if arch.softmax_type != "vanilla":
        fields["softmax_type"] = arch.softmax_type
    if arch.rope_pattern:
        fields["no_rope_freq"] = no_rope(arch.rope_pattern)
    if arch.num_experts:
        fields[FIELDS["expert_ffn_size"]] = arch.expert_ffn_size
        fields[FIELDS["shared_ffn_size"]] = arch.shared_ffn_size or None
        fields[FIELDS["moe_pattern"]] = layer_freq(_moe_pattern(arch))
    if arch.mamba:
        return fields | {setting: getattr(arch.mamba, name) for name, setting in _MAMBA.items()}
    if hybrid:
        fields["num_layers"] = 2 * arch.num_layers
        if arch.num_experts:  # Megatron divides logged losses by the number of MoE layers
            fields[FIELDS["moe_pattern"]] = [int(is_moe) for moe in _moe_pattern(arch) for is_moe in (False, moe)]
    return fields


def _moe_pattern(arch: Architecture) -> list[bool]:
    return [arch.is_moe_layer(layer) for layer in range(arch.num_layers)]


def hybrid_symbols(arch: Architecture) -> str:
    """Return the pattern, without borders, of a HybridModel with an architecture."""
    if arch.mamba is None:
        return hybrid_pattern(_moe_pattern(arch))
    return "".join("E" if moe else symbol for symbol, moe in zip(arch.mamba.pattern, _moe_pattern(arch), strict=True))


def architecture_of(config: Any, vocab_size: int) -> Architecture:
    """Return the architecture of a NeMo or Megatron model configuration, with only the fields that decide FLOPs.

    Args:
        config: a `TransformerConfig`, a NeMo `GPTConfig`, or a `run.Config` of one.
        vocab_size: V of the tokenizer, without the rows that only pad the embedding.

    Example:
        >>> architecture_of(recipe.model.config, 128256).total_params  # doctest: +SKIP
        47491321856
    """
    names = (*_SHAPES, "gated", *_BIASES, "tied_embeddings", "num_experts")
    fields = {name: getattr(config, FIELDS[name]) for name in names}
    hybrid = hybrid_of(config)
    fields["num_layers"] = hybrid.num_layers if hybrid else fields["num_layers"]
    if hybrid and hybrid.has_mamba:
        sizes = {name: getattr(config, setting) for name, setting in _MAMBA.items()}
        fields["mamba"] = MambaLayers(pattern=hybrid.with_experts([False] * len(hybrid.networks)), **sizes)
    fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // fields["num_heads"]
    fields["qkv_bias"] = fields["qkv_bias"] or fields["ffn_bias"]  # Megatron has one setting for all other biases
    if fields["num_experts"]:
        pattern = hybrid.moe_pattern if hybrid else layer_pattern(config.moe_layer_freq, config.num_layers)
        fields |= {
            "top_k": config.moe_router_topk,
            "expert_ffn_size": config.moe_ffn_hidden_size or config.ffn_hidden_size,
            "shared_ffn_size": config.moe_shared_expert_intermediate_size or 0,
            "moe_pattern": None if all(pattern) else pattern,
        }
    scale = getattr(config, "softmax_scale", None)
    fields |= {} if scale is None or scale == fields["head_dim"] ** -0.5 else {"attention_multiplier": scale}
    fields |= layer_fields(config) | {"rotary_percent": getattr(config, "rotary_percent", 1.0)} | gates_of(config)
    fields["softmax_type"] = getattr(config, "softmax_type", None) or "vanilla"
    fields["rope_pattern"] = rope_pattern(getattr(config, "no_rope_freq", None), fields["num_layers"])
    return Architecture(hf_class="", vocab_size=vocab_size, attention_out_bias=fields["ffn_bias"], **fields)


def router_fields(model: Architecture | UpcycleSpec | None) -> dict[str, Any]:
    """Return Megatron's settings for experts and routing; empty for a dense model.

    Args:
        model: architecture of the model, or the spec that makes the model; None for a dense model.
    """
    if not model or not model.num_experts:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.top_k,
        "moe_router_pre_softmax": model.router_kind.pre_softmax,
        "moe_router_score_function": model.router_kind.score,
        "moe_router_topk_scaling_factor": None if model.routed_scaling_factor == 1 else model.routed_scaling_factor,
        **({"moe_router_enable_expert_bias": True} if getattr(model, "balancing_bias", False) else {}),
    }


def moe_fields(spec: UpcycleSpec, ffn_size: int, num_layers: int) -> dict[str, Any]:
    """Return all Megatron settings that a spec needs in a model of these sizes.

    Args:
        spec: spec of the model.
        ffn_size: F of the dense parent.
        num_layers: L.
    """
    width = ffn_size // spec.granularity
    return router_fields(spec) | {
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": spec.shared_experts * width or None,
        "moe_layer_freq": layer_freq(spec.moe_pattern(num_layers)),
    }


def spec_fields(settings: Mapping[str, Any], ffn_size: int, num_layers: int) -> dict[str, tuple[str, Any]]:
    """Return the spec fields that a model's settings need: field -> (Megatron's setting, value).

    This is the inverse of `moe_fields`.

    Args:
        settings: Megatron's settings of the model, as plain values.
        ffn_size: F of the dense parent.
        num_layers: L.
    """
    get = settings.get
    width = get("moe_ffn_hidden_size") or ffn_size
    pattern = layer_pattern(get("moe_layer_freq") or 1, num_layers)
    numbers = ",".join(str(layer) for layer, is_moe in enumerate(pattern) if is_moe)
    shared = (get("moe_shared_expert_intermediate_size") or 0) // width
    score = get("moe_router_score_function") or "softmax"
    kind = find_router_kind(score, pre_softmax=bool(get("moe_router_pre_softmax")))
    return {
        "num_experts": ("num_moe_experts", get("num_moe_experts")),
        "top_k": ("moe_router_topk", get("moe_router_topk", 2)),
        "granularity": ("moe_ffn_hidden_size", ffn_size // width),
        "shared_experts": ("moe_shared_expert_intermediate_size", shared),
        "moe_layers": ("moe_layer_freq", "all" if all(pattern) else numbers),
        "router_order": ("moe_router_pre_softmax", kind.order),
        "router_score": ("moe_router_score_function", kind.score),
        "routed_scaling_factor": ("moe_router_topk_scaling_factor", get("moe_router_topk_scaling_factor") or 1.0),
    }


def check_spec(
    config: Any,
    spec: UpcycleSpec | None,
    hybrid: HybridLayers | None = None,
    parent: Architecture | None = None,
) -> None:
    """Check that a model with a configuration can be filled, and that the configuration agrees with a spec.

    Args:
        config: configuration of Megatron or NeMo, built or as a `run.Config`.
        spec: spec of the model; None if the model is the parent itself.
        hybrid: layers of a HybridModel; None for a GPTModel.
        parent: architecture of the parent, if it is known and may have experts.

    Raises:
        SpecError: configuration and spec disagree, or the model would not compute its parent's function.
    """
    wanted = (router_fields(source) if (source := spec or parent) else {}) or {"num_moe_experts": None}
    fix = "set it to the expected value, or change the spec"
    for name, value in wanted.items():
        got = getattr(config, name, None)
        if got != value and not (not got and not value) and not (value is None and got == 1):
            expected = f"{value}, as in the UpcycleSpec" if spec else "none without an UpcycleSpec"
            expected = f"{value}, as in the parent" if value and not spec else expected
            raise SpecError(field=f"model.config.{name}", got=got, expected=expected, fix=fix)
    check_fields(config)
    if spec is None:
        return
    require_files(spec)
    _check_routing_type(config, spec)
    check_balancing(config, spec.router_score)
    capacity = getattr(config, "moe_expert_capacity_factor", None)
    pad = bool(getattr(config, "moe_pad_expert_input_to_capacity", False))
    try:  # for Megatron, a negative factor means no capacity limit
        check_capacity(None if capacity is None or capacity < 0 else capacity, pad, spec.num_experts, spec.top_k)
    except SpecError as error:
        raise error.renamed(lambda name: f"model.config.moe_expert_{name}") from None
    if hybrid:
        expected = hybrid.with_experts(spec.moe_pattern(len(hybrid.networks)))
        hybrid.require(expected, f"moe_layers={spec.moe_layers}")
        return
    frequency, layers = getattr(config, "moe_layer_freq", 1), config.num_layers
    got_layers = layers if isinstance(frequency, int) else len(frequency)
    if (want := spec.moe_pattern(layers)) != layer_pattern(frequency, got_layers):
        got = frequency if isinstance(frequency, int) else list(frequency)
        expected = f"{[int(is_moe) for is_moe in want]} (moe_layers={spec.moe_layers})"
        raise SpecError(field="model.config.moe_layer_freq", got=got, expected=expected, fix=fix)


def _check_routing_type(config: Any, spec: UpcycleSpec) -> None:
    """Check the type of the router's logits: in 16 bits two copies can have equal logits, and top-k would mix them."""
    is_recipe = hasattr(config, "__fn_or_cls__")  # in a recipe, the precision plugin sets the type later
    in_float32 = config.params_dtype is torch.float32 and not (config.bf16 or config.fp16 or is_recipe)
    if spec.needs_float32_routing and not in_float32 and (got := config.moe_router_dtype) not in ("fp32", "fp64"):
        raise SpecError(
            field="model.config.moe_router_dtype",
            got=got,
            expected=f"fp32 or fp64 with granularity={spec.granularity}, because in 16 bits top-k mixes copies",
            fix="set it to fp32",
        )


def check_model(model: Any, moe_arch: Architecture) -> None:
    """Check that a built model has the settings that a checkpoint's architecture needs.

    Args:
        model: a Megatron `GPTModel` or `HybridModel`.
        moe_arch: expected architecture of the model. This is the dense architecture if no experts are made.

    Raises:
        SpecError: a field of the model's configuration is refused or unknown.
        CheckpointError: the model has other shapes, or would compute another function with the same weights.
    """
    check_fields(model.config, model, getattr(model, "rotary_pos_emb", None))
    for error in mismatches(model, moe_arch):
        raise error


def mismatches(model: Any, moe_arch: Architecture) -> Iterator[CheckpointError]:
    """Yield an error for each setting of a built model that differs from the checkpoint, see `check_model`."""
    config, frequencies = model.config, getattr(getattr(model, "rotary_pos_emb", None), "inv_freq", None)
    fields = (*_BLOCK, *(("expert_ffn_size", "shared_ffn_size") if moe_arch.num_experts else ()))
    if hybrid := hybrid_of(model):
        hybrid.require(hybrid_symbols(moe_arch), "as in the parent")
    settings, wanted = [FIELDS[field] for field in fields], megatron_fields(moe_arch, hybrid=hybrid is not None)
    settings += _MAMBA.values() if moe_arch.mamba else ()
    settings += ("moe_router_enable_expert_bias",) if moe_arch.balancing_bias else ()
    checks: list[tuple[str, Any, Any]] = [(name, getattr(config, name), wanted[name]) for name in settings]
    scale = config.softmax_scale or moe_arch.head_dim**-0.5
    if not math.isclose(scale, moe_arch.softmax_scale, rel_tol=1e-6):
        default = "" if moe_arch.attention_multiplier else "None or "
        checks.append(("softmax_scale", config.softmax_scale, f"{default}{moe_arch.softmax_scale:.6g}"))
    checks.append(("softmax_type", config.softmax_type, moe_arch.softmax_type))
    checks += [*wrong_layers(model, moe_arch), *wrong_gates(config, moe_arch)]
    if rope_pattern(getattr(config, "no_rope_freq", None), moe_arch.num_layers) != moe_arch.rope_pattern:
        wanted_rope = no_rope(moe_arch.rope_pattern) if moe_arch.rope_pattern else None
        checks.append(("no_rope_freq", config.no_rope_freq, wanted_rope))
    if hasattr(config, "rotary_percent"):  # only NeMo and Bridge have this setting
        checks.append(("rotary_percent", config.rotary_percent, moe_arch.rotary_percent))
    # Nothing else notices a wrong value of these settings, and a wrong value changes the function. NeMo scales the
    # rotary frequencies outside its config.
    checks.append(("activation_func", activation_of(config.activation_func), moe_arch.activation))
    in_model = replace(moe_arch, rope_scaling=None) if moe_arch.scales_in_layers else moe_arch
    factor, got_factor = attention_factor(in_model), factor_of(config)
    if not math.isclose(got_factor, factor, rel_tol=1e-6):
        checks.append(("yarn_mscale", f"a factor of {got_factor:.6g}", f"{factor:.6g} on sine and cosine"))
    if factor != 1 and config.apply_rope_fusion:  # the fused kernel does not apply the factor
        checks.append(("apply_rope_fusion", True, False))
    length = model.max_sequence_length
    if frequencies is not None and not frequencies.is_meta and not same_frequencies(frequencies, in_model, length):
        got = f"rotary_base {model.rotary_base:g}, frequencies down to {float(frequencies[-1]):.4g}"
        expected = f"rope_theta {moe_arch.rope_theta:g}, rope_scaling {in_model.rope_scaling}"
        checks.append(("rotary_base and RoPE scaling", got, expected))
    for name, got, value in checks:
        if got != value:
            expected, fix = f"{value}, as in the parent", "use the parent's own configuration"
            yield CheckpointError(field=f"model.config.{name}", got=got, expected=expected, fix=fix)


def changed_by(model: Any, dense: Architecture, spec: UpcycleSpec | None) -> Iterator[str]:
    """Yield reasons why exact weights do not make an exact model: dropped tokens, other attention, other embedding."""
    config = model.config
    factor = config.moe_expert_capacity_factor
    if spec and factor is not None and factor >= 0 and factor * spec.top_k < spec.num_experts:
        yield f"moe_expert_capacity_factor={factor} drops the tokens of experts that overflow"
    factor = getattr(config, "moe_expert_rank_capacity_factor", None)
    if spec and factor is not None and factor < config.expert_model_parallel_size:
        yield f"moe_expert_rank_capacity_factor={factor} drops the tokens of ranks that overflow"
    # Hugging Face's window includes the current token. Megatron's window does not, and NeMo's import ignores this.
    tokens, window = min(dense.max_positions, model.max_sequence_length), config.window_size
    seen = window[0] + 1 if window and window[0] >= 0 else tokens
    wanted, layers = dense.sliding_window or tokens, dense.num_layers
    pattern = layers_with(config.window_attn_skip_freq, layers)
    is_where = pattern == (dense.window_pattern or (True,) * layers)
    if min(seen, tokens) != min(wanted, tokens) or (seen < tokens and not is_where):
        exact, where = window_fields(dense).get("window_size"), "every layer"
        if dense.window_pattern:
            where = f"layers {', '.join(str(layer) for layer, sees in enumerate(dense.window_pattern) if sees)}"
        yield f"window_size={window} differs from the parent's attention; {exact} in {where} would be equal"
    # Gemma multiplies its embedding by sqrt(D). NeMo's model class does so, but Megatron has no setting for it.
    scales = any(base.__name__ == "EmbeddingScalingMixin" for base in type(getattr(model, "embedding", None)).__mro__)
    if model.pre_process and scales is not dense.scaled_embedding:
        done = ("does not multiply", "multiplies")[scales]
        yield f"the model {done} its embedding by sqrt(hidden_size), unlike the parent: see NeMo's GemmaModel"
