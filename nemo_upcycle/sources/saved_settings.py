"""The settings of a model that checkpoints keep beside the weights, under NeMo's names.

NeMo writes `context/model.yaml`, Bridge writes `run_config.yaml`, and Megatron-LM writes its arguments into
`common.pt`. All are read as plain values: a class name is only text here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.hybrid import HybridLayers
from nemo_upcycle.models.rotary import scaling_settings
from nemo_upcycle.sources.torch_pickles import Inert, read_saved
from nemo_upcycle.utils.conf import read_yaml


#: Bridge's configuration classes that are supported here.
_BRIDGE_MODELS = ("GPTModelProvider", "GPTModelConfig", "HybridModelProvider", "HybridModelConfig")
#: Megatron-LM's argument -> NeMo's setting, if the names differ.
_ARGUMENTS = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "swiglu": "gated_linear_unit",
    "num_experts": "num_moe_experts",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}


def saved_settings(checkpoint: Path, fix: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the file that describes a checkpoint's model, and NeMo's settings from it, or None without such a file.

    Args:
        checkpoint: checkpoint folder.
        fix: fix to suggest if the description cannot be read.

    Raises:
        CheckpointError: there is a description, but it cannot be read.
    """
    readers = {
        "context/model.yaml": _nemo_settings,
        "run_config.yaml": _bridge_settings,
        "common.pt": _megatron_settings,
        "weights/common.pt": _megatron_settings,
    }
    for path, read in ((checkpoint / name, read) for name, read in readers.items()):
        if not path.is_file():
            continue
        try:
            settings = read(path)
        except UpcycleError as error:
            raise CheckpointError(
                str(path), kind="state", got=f"cannot be read ({error.problem.rpartition(f'{path} ')[2]})", fix=fix
            ) from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                str(path), kind="state", got=f"does not describe a language model ({type(error).__name__})", fix=fix
            ) from None
        if settings:
            return path, settings
    return None


def _nemo_settings(path: Path) -> dict[str, Any]:
    """Return the settings of NeMo's model configuration by name."""
    described = read_yaml(path)
    settings = dict(described["config"])
    settings["_target_"].split(".")[-2]  # fails unless the text names a class in a module
    if adapters := described.get("model_transform"):
        settings["lora_alpha"] = float(adapters.get("alpha", 32))  # NeMo's default
    return settings


def _bridge_settings(path: Path) -> dict[str, Any]:
    """Return the settings of Bridge's model under Megatron's names, which NeMo also uses."""
    described = read_yaml(path)
    model = dict(described["model"])
    settings = model | dict(model.get("transformer") or {})  # a builder keeps these in a section
    if model["_target_"].rpartition(".")[2] in _BRIDGE_MODELS:  # other classes compute differently
        settings["_target_"] = "megatron.GPTModel"
    # A builder's configuration omits the activation. Assume silu, which nearly every parent has.
    activation = settings.setdefault("activation_func", {"_target_": "torch.nn.functional.silu"})["_target_"]
    int(settings["num_layers"])
    settings |= _dense_layers(settings)
    if activation.endswith(".gelu"):
        settings["activation_func"] = {"_target_": "openai_gelu"}
    if settings.get("rope_scaling"):
        settings |= scaling_settings(settings.get("rope_scaling_factor", 8.0))
    settings["started_from"] = (described.get("checkpoint") or {}).get("pretrained_checkpoint")
    adapters = described.get("peft") or {}
    if adapters.get("_target_", "").endswith(".LoRA"):
        settings["lora_alpha"] = float(adapters.get("alpha", 32))  # Bridge's default
        settings["lora_base"] = settings["started_from"]
    return settings


def _megatron_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings from the arguments of a Megatron-LM run, or None if the file has no arguments."""
    saved = read_saved(path)
    arguments = saved.get("args") if isinstance(saved, dict) else None
    if not isinstance(arguments, Inert) or "num_layers" not in (given := vars(arguments)):
        return None
    settings = {_ARGUMENTS.get(name, name): value for name, value in given.items() if not isinstance(value, Inert)}
    settings |= {
        "_target_": "megatron.training.arguments",
        "activation_func": {"_target_": "torch.nn.functional." + ("silu" if given.get("swiglu") else "gelu")},
        "share_embeddings_and_output_weights": not given.get("untie_embeddings_and_output_weights"),
        "num_query_groups": given.get("num_query_groups") if given.get("group_query_attention") else None,
    }
    settings |= _dense_layers(settings)
    if given.get("use_rope_scaling"):
        settings |= scaling_settings(given.get("rope_scaling_factor", 8.0))
    return settings


def _dense_layers(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the layer settings of the GPTModel that computes the same as a HybridModel; empty for other models."""
    pattern = settings.get("hybrid_layer_pattern") or ""
    if not pattern or "M" in pattern:
        return {}
    hybrid = HybridLayers(pattern)
    return {"num_layers": hybrid.num_layers, "moe_layer_freq": [int(is_moe) for is_moe in hybrid.moe_pattern]}
