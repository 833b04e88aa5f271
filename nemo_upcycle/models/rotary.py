"""The rotary embedding's frequencies that an architecture asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture


if TYPE_CHECKING:
    import torch  # a second and a half, which the planner does without

#: The scaling of arXiv 2402.13753: a factor for each frequency, others for long sequences, and one on sine and cosine.
LONGROPE = "longrope"


def rope_kind(arch: Architecture) -> str:
    """Return how the rotary frequencies are scaled: `default` (not at all) or `llama3`.

    Raises:
        CheckpointError: in another way, which Megatron-Core's rotary embedding does not know.
    """
    kind = (arch.rope_scaling or {}).get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise CheckpointError(
            "rope_scaling",
            got=kind,
            expected="default or llama3",
            fix="use a checkpoint without position interpolation, or nemo-upcycle convert",
        )
    return str(kind)


def rope_frequencies(arch: Architecture) -> torch.Tensor:
    """Return the rotary embedding's inverse frequencies, float32 [K / 2], scaled as `rope_scaling` says.

    Where heads are turned in part, K is that part.

    Raises:
        CheckpointError: the kind of scaling is not known; only none and Llama 3's are.
    """
    import torch

    turned = int(arch.head_dim * arch.rotary_percent)
    inverse = arch.rope_theta ** -(torch.arange(0, turned, 2, dtype=torch.float32) / turned)
    scaling = arch.rope_scaling or {}
    if rope_kind(arch) == "default":
        return inverse
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    # Long waves are stretched by the factor, short ones kept, and those between get a mean of the two.
    turns = float(scaling["original_max_position_embeddings"]) * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inverse / factor + kept * inverse


def same_frequencies(inverse: torch.Tensor, arch: Architecture) -> bool:
    """Return whether a model's inverse frequencies are the architecture's, up to rounding."""
    import torch

    expected = rope_frequencies(arch)
    return inverse.shape == expected.shape and torch.allclose(inverse.cpu().float(), expected, rtol=1e-5, atol=0)


def scaling_settings(factor: float) -> dict[str, Any]:
    """Return NeMo's settings of the scaling of rotary frequencies that Megatron has: Llama 3.1's, with any factor."""
    return {"scale_factor": factor, "old_context_len": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def scaling_of(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling`, as Hugging Face has it, of NeMo's settings; None without any."""
    if "old_context_len" not in settings:
        return None
    return {
        "rope_type": "llama3",
        "factor": float(settings["scale_factor"]),
        "low_freq_factor": float(settings["low_freq_factor"]),
        "high_freq_factor": float(settings["high_freq_factor"]),
        "original_max_position_embeddings": int(settings["old_context_len"]),
    }
