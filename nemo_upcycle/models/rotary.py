"""Frequencies of an architecture's rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.architecture_parts import Rope


if TYPE_CHECKING:
    import torch  # importing torch takes 1.5 s, and the planner does not need torch

#: Scaling of arXiv 2402.13753: a factor for each frequency, other factors for long sequences, and a factor on sine and
#: cosine.
LONGROPE = "longrope"
#: Scaling by a factor that grows with the length of the sequence. Only transformers computes this scaling.
DYNAMIC = "dynamic"
#: Scaling of Gemma 4's heads, which are rotated in part. Only transformers computes this scaling.
PROPORTIONAL = "proportional"
#: Kinds of `rope_scaling` whose frequencies this module computes.
KINDS = ("default", "linear", "llama3", "yarn", LONGROPE)
_SHORT = "original_max_position_embeddings"


def rope_kind(arch: Rope) -> str:
    """Return the kind of scaling of the rotary frequencies, one of `KINDS`; `default` means no scaling.

    Raises:
        CheckpointError: the kind is unknown.
    """
    kind = (arch.rope_scaling or {}).get("rope_type", "default")
    if kind not in KINDS:
        raise CheckpointError(
            "rope_scaling",
            got=kind,
            expected=" or ".join(KINDS),
            fix="use a checkpoint without position interpolation",
        )
    return str(kind)


def plain_frequencies(rope: Rope, theta: float | None = None) -> torch.Tensor:
    """Return a rotary embedding's inverse frequencies without scaling, float32 [K / 2].

    Args:
        rope: rotary embedding of the model.
        theta: base to use instead of the model's base.
    """
    import torch

    turned = int(rope.head_dim * rope.rotary_percent)
    return (theta or rope.rope_theta) ** -(torch.arange(0, turned, 2, dtype=torch.float32) / turned)


def layer_frequencies(rope: Rope, windowed: bool) -> torch.Tensor:
    """Return the inverse frequencies of a layer, with a window or without."""
    if windowed and rope.local_rope_theta is not None:
        return plain_frequencies(rope, rope.local_rope_theta)
    return rope_frequencies(rope)


def rope_frequencies(arch: Rope, length: int = 0) -> torch.Tensor:
    """Return the rotary embedding's inverse frequencies, float32 [K / 2], scaled as `rope_scaling` says.

    If heads are rotated in part, K is the size of the rotated part.

    Args:
        arch: rotary embedding of the model.
        length: length of the sequences (tokens). LongRoPE has other frequencies for long sequences.

    Raises:
        CheckpointError: the kind of scaling is unknown.
    """
    import torch

    inverse, scaling, kind = plain_frequencies(arch), arch.rope_scaling or {}, rope_kind(arch)
    if kind == "default":
        return inverse
    if kind == "linear":
        return inverse / float(scaling["factor"])
    if kind == "yarn":
        return _yarn_frequencies(inverse, arch)
    if kind == LONGROPE:
        factors = scaling["long_factor" if length > scaling[_SHORT] else "short_factor"]
        if len(factors) != len(inverse):
            expected = f"{len(inverse)}, one for each pair of rotated numbers of a head"
            fix = "correct rope_scaling in config.json"
            raise CheckpointError("number of LongRoPE factors", got=len(factors), expected=expected, fix=fix)
        return inverse / torch.tensor(factors, dtype=torch.float32)
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    # The factor stretches long waves. Short waves do not change, and waves between get a weighted mean.
    turns = float(scaling[_SHORT]) * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inverse / factor + kept * inverse


def _yarn_frequencies(inverse: torch.Tensor, arch: Rope) -> torch.Tensor:
    """Return the frequencies of YaRN (arXiv 2309.00071): low frequencies are divided, high ones do not change."""
    import torch

    scaling, count = arch.rope_scaling or {}, 2 * len(inverse)
    trained = scaling.get(_SHORT) or arch.max_positions
    # Indices of two numbers of a head. Over the trained positions, the first number makes beta_fast turns, and the
    # second number makes beta_slow turns.
    places = [
        count * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(arch.rope_theta))
        for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
    ]
    if scaling.get("truncate", True):
        places = [math.floor(places[0]), math.ceil(places[1])]
    first, last = max(places[0], 0), min(places[1], count - 1)
    slowed = ((torch.arange(len(inverse), dtype=torch.float32) - first) / (last - first or 1e-3)).clamp(0, 1)
    return inverse * (1 - slowed) + inverse / float(scaling["factor"]) * slowed


def attention_factor(arch: Rope) -> float:
    """Return the factor on sine and cosine, which is 1 except for YaRN and LongRoPE.

    All sequences get the factor of the longest sequence.
    """
    scaling = arch.rope_scaling or {}
    if (kind := scaling.get("rope_type")) not in ("yarn", LONGROPE):
        return 1.0
    if factor := scaling.get("attention_factor"):
        return float(factor)
    if kind == "yarn":
        grown = 0.1 * math.log(max(1.0, float(scaling["factor"])))
        mine, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        return float((mine * grown + 1) / (all_dim * grown + 1)) if mine and all_dim else grown + 1
    short = scaling[_SHORT]
    stretched = arch.max_positions / short if short != arch.max_positions else scaling.get("factor", 1.0)
    return math.sqrt(1 + math.log(stretched) / math.log(short)) if stretched > 1 else 1.0


def same_frequencies(inverse: torch.Tensor, arch: Architecture, length: int = 0, windowed: bool | None = None) -> bool:
    """Return whether a model has the inverse frequencies of an architecture, up to rounding.

    Args:
        inverse: inverse frequencies of the model, or of one of its layers.
        arch: the architecture.
        length: length of the sequences, see `rope_frequencies`.
        windowed: whether the layer sees a window; None if `inverse` belongs to the whole model.
    """
    import torch

    expected = rope_frequencies(arch, length) if windowed is None else layer_frequencies(arch, windowed)
    return inverse.shape == expected.shape and torch.allclose(inverse.cpu().float(), expected, rtol=1e-5, atol=0)


def turn_as(model: Any, arch: Architecture) -> None:
    """Give a Megatron model the rotary embedding of an architecture, for the sequence length of the model.

    Args:
        model: a `GPTModel`. This function also changes its configuration, because Megatron-Core 0.15 computes a factor
            on sine and cosine from YaRN's settings, except in the fused kernel of `apply_rope_fusion`.
        arch: the architecture.
    """
    rotary = model.rotary_pos_emb
    if arch.scales_in_layers:
        return
    rotary.inv_freq = rope_frequencies(arch, model.max_sequence_length).to(rotary.inv_freq.device)
    if (factor := attention_factor(arch)) != 1:
        for name, value in zip(_YARN, (math.e, 10 * (factor - 1), 0.0), strict=True):
            setattr(model.config, name, value)


#: Megatron's settings for YaRN, from which Megatron computes a factor on sine and cosine.
_YARN = ("yarn_rotary_scaling_factor", "yarn_mscale", "yarn_mscale_all_dim")


def factor_of(config: Any) -> float:
    """Return the factor on sine and cosine in a Megatron model."""
    stretched, part, whole = (getattr(config, name, None) for name in _YARN)
    if stretched is None or part is None or whole is None or stretched <= 1:
        return 1.0
    return float((0.1 * part * math.log(stretched) + 1) / (0.1 * whole * math.log(stretched) + 1))


def scaling_settings(factor: float) -> dict[str, Any]:
    """Return NeMo's settings for the only rotary scaling that Megatron has: Llama 3.1's, with any factor."""
    return {"scale_factor": factor, "old_context_len": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


#: NeMo's setting for Llama 3.1's scaling -> Hugging Face's setting.
_LLAMA3 = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": _SHORT,
}
_OF_LONGROPE = ("short_factor", "long_factor", _SHORT)


def scaling_of(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return Hugging Face's `rope_scaling` for NeMo's settings; None for no scaling."""
    if settings.get("short_factor"):
        return {"rope_type": LONGROPE, **{name: settings[name] for name in _OF_LONGROPE}}
    if "old_context_len" not in settings:
        return None
    numbers = {theirs: float(settings[ours]) for ours, theirs in _LLAMA3.items()}
    return {"rope_type": "llama3", **numbers, _SHORT: int(settings["old_context_len"])}


def nemo_scaling(arch: Architecture) -> dict[str, Any]:
    """Return NeMo's settings for Llama 3.1's scaling or LongRoPE; the inverse of `scaling_of`."""
    scaling = arch.rope_scaling or {}
    if rope_kind(arch) == LONGROPE:
        return {name: scaling[name] for name in _OF_LONGROPE} | {"max_position_embeddings": arch.max_positions}
    return {ours: scaling[theirs] for ours, theirs in _LLAMA3.items()} if rope_kind(arch) == "llama3" else {}
