"""In which layers of a model something holds, in Megatron's settings: norms, positions, windows of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_upcycle.models.architecture import Architecture


#: Fields that say where norms stand: settings of `online.decoder_layers`, which Megatron has none for.
NORMS = ("pre_norm", "post_norm", "wide_qk_norm")


def layer_norms(config: Any) -> dict[str, bool]:
    """Return where the layers of a configuration have norms, field by field; nothing where they are Megatron's own."""
    spec = getattr(config, "transformer_layer_spec", None)
    given = getattr(spec, "keywords", None) or getattr(spec, "__arguments__", {})
    return {name: given[name] for name in NORMS if name in given}


def window_fields(arch: Architecture) -> dict[str, Any]:
    """Return Megatron's settings of a sliding window: the tokens before the current one, and in which layers."""
    if not arch.sliding_window:
        return {}
    pattern = arch.window_pattern
    layers = {"window_attn_skip_freq": [int(sees) for sees in pattern]} if pattern else {}
    return {"window_size": (arch.sliding_window - 1, 0), **layers}


def no_rope(pattern: Sequence[bool]) -> list[int]:
    """Return Megatron's `no_rope_freq` of the layers with positions."""
    return [int(not turns) for turns in pattern]


def layers_with(setting: int | Sequence[int] | None, num_layers: int, default: bool) -> tuple[bool, ...]:
    """Return in which layers a setting of Megatron's holds: all but each n-th, or those of a list."""
    if isinstance(setting, int) and setting:
        return tuple((layer + 1) % setting != 0 for layer in range(num_layers))
    return tuple(map(bool, setting)) if setting else (default,) * num_layers


def rope_pattern(no_rope_freq: int | Sequence[int] | None, num_layers: int) -> tuple[bool, ...] | None:
    """Return in which layers there are positions, from Megatron's `no_rope_freq`; None for all."""
    turns = layers_with(no_rope_freq, num_layers, True)
    if no_rope_freq and not isinstance(no_rope_freq, int):
        turns = tuple(not skips for skips in turns)
    return None if all(turns) else turns
