"""Megatron's settings that say which layers have norms, positions and attention windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.architecture_parts import Attention
from nemo_upcycle.models.rotary import same_frequencies


#: Fields that say where norms are. Megatron has no such settings, so these fields are settings of
#: `online.decoder_layers`.
NORMS = ("pre_norm", "post_norm", "wide_qk_norm")
#: Fields with factors of a layer or of the model, 1 in most models. They are also settings of `online.decoder_layers`.
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
DECODER = (*NORMS, *MULTIPLIERS)
#: Fields of the rotary embedding. They are settings of `online.decoder_layers` if layers have their own frequencies.
ROPE = ("rope_theta", "rope_scaling", "local_rope_theta", "max_positions", "rotary_percent")


def decoder_settings(arch: Architecture) -> dict[str, Any]:
    """Return the settings with which `online.decoder_layers` builds the layers of an architecture."""
    names = (*DECODER, *(ROPE if arch.scales_in_layers else ()), *(("shared_gate",) if arch.shared_gate else ()))
    return {name: getattr(arch, name) for name in names}


def layer_fields(config: Any) -> dict[str, Any]:
    """Read the `Architecture` fields that a configuration has and that Megatron's own layers do not support."""
    spec = getattr(config, "transformer_layer_spec", None)
    given = spec if isinstance(spec, dict) else getattr(spec, "keywords", None) or getattr(spec, "__arguments__", {})
    return {name: given[name] for name in (*DECODER, "shared_gate") if name in given}


def wrong_layers(model: Any, arch: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings to compare in the layers of a Megatron model: name, got, expected.

    Args:
        model: this rank's part of a `GPTModel` or `HybridModel`.
        arch: architecture that the model should have.
    """
    for layer in model.decoder.layers:
        names = ("embedding_multiplier",) * (layer.layer_number == 1) + ("residual_multiplier",)
        for name in names:
            yield f"transformer_layer_spec.{name}", getattr(layer, name, 1.0), getattr(arch, name)
        windowed = arch.window_of(layer.layer_number - 1) is not None
        got = getattr(layer, "rotary_frequencies", None)
        is_right = arch.scales_in_layers == (got is not None)
        if got is not None and is_right:
            is_right = same_frequencies(got, arch, windowed=windowed)
        if not is_right:
            wanted = f"those of rope_theta {arch.rope_theta:g}, {arch.rope_scaling}, {arch.local_rope_theta}"
            yield f"transformer_layer_spec: frequencies of layer {layer.layer_number - 1}", "others", wanted
    if (norm := getattr(model.decoder, "final_layernorm", None)) is not None:
        yield "transformer_layer_spec.logits_scaling", getattr(norm, "logits_scaling", 1.0), arch.logits_scaling


def window_fields(arch: Attention) -> dict[str, Any]:
    """Return Megatron's settings for a sliding window: tokens before the current token, and layers with the window."""
    if not arch.sliding_window:
        return {}
    pattern = arch.window_pattern
    layers = {"window_attn_skip_freq": [int(sees) for sees in pattern]} if pattern else {}
    return {"window_size": (arch.sliding_window - 1, 0), **layers}


def no_rope(pattern: Sequence[bool]) -> list[int]:
    """Return Megatron's `no_rope_freq` for a pattern of layers with positions."""
    return [int(not turns) for turns in pattern]


def layers_with(setting: int | Sequence[int] | None, num_layers: int) -> tuple[bool, ...]:
    """Return the layers that a Megatron setting selects: all layers, all but every n-th layer, or a list of layers."""
    if isinstance(setting, int) and setting:
        return tuple((layer + 1) % setting != 0 for layer in range(num_layers))
    return tuple(map(bool, setting)) if setting else (True,) * num_layers


def rope_pattern(no_rope_freq: int | Sequence[int] | None, num_layers: int) -> tuple[bool, ...] | None:
    """Return which layers have positions, from Megatron's `no_rope_freq`; None for all layers."""
    turns = layers_with(no_rope_freq, num_layers)
    if no_rope_freq and not isinstance(no_rope_freq, int):
        turns = tuple(not skips for skips in turns)
    return None if all(turns) else turns


def layer_freq(pattern: Sequence[bool]) -> int | list[int]:
    """Return Megatron's `moe_layer_freq` for a pattern of layers with experts."""
    return 1 if all(pattern) else [int(is_moe) for is_moe in pattern]


def layer_pattern(layer_freq: int | Sequence[int], num_layers: int) -> tuple[bool, ...]:
    """Return which layers have experts, from Megatron's `moe_layer_freq`."""
    if isinstance(layer_freq, int):
        return tuple(layer % layer_freq == 0 for layer in range(num_layers))
    return tuple(bool(layer_freq[layer]) for layer in range(num_layers))
