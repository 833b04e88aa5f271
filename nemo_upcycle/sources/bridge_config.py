"""The settings of Megatron-Bridge's model, from a checkpoint's `run_config.yaml`: plain values, nothing is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemo_upcycle.errors import CheckpointError


BRIDGE_CONFIG = "run_config.yaml"


def bridge_settings(path: Path) -> dict[str, Any]:
    """Return the settings of Bridge's model, by Megatron's names, which are NeMo's.

    Args:
        path: the `run_config.yaml`.

    Raises:
        CheckpointError: it cannot be read, or describes no language model.
    """
    try:
        model = dict(yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
        settings = model | dict(model.get("transformer") or {})  # of a builder's configuration, beside the model's
        if model["_target_"].rpartition(".")[2] in ("GPTModelProvider", "GPTModelConfig"):  # others compute otherwise
            settings["_target_"] = "megatron.GPTModel"
        # A builder's configuration is written without it: then it is that of nearly every parent.
        activation = settings.setdefault("activation_func", {"_target_": "torch.nn.functional.silu"})["_target_"]
        int(settings["num_layers"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            str(path),
            got=f"an unreadable description ({type(error).__name__})",
            expected="the run of a language model in Megatron-Bridge",
            fix="copy the checkpoint again",
        ) from None
    if activation.endswith(".gelu"):
        settings["activation_func"] = {"_target_": "openai_gelu"}
    if settings.get("rope_scaling"):
        settings |= megatron_rope_scaling(settings.get("rope_scaling_factor", 8.0))
    return settings


def megatron_rope_scaling(factor: float) -> dict[str, Any]:
    """Return NeMo's settings of the scaling of rotary frequencies that Megatron has: Llama 3.1's, with any factor."""
    return {"scale_factor": factor, "old_context_len": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
