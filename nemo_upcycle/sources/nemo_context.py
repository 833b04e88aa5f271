"""The architecture of a NeMo 2 checkpoint, from the plain files of its `context/`.

NeMo keeps two descriptions of the model there: `io.json`, to be rebuilt by importing the classes that it names, and
`model.yaml`, all settings as plain values, defaults included. Only the latter is read, with a safe loader: a class
name is a text here, compared with known ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.config_fields import refusals
from nemo_upcycle.models.families import find_nemo_module, llama, parents, qwen3
from nemo_upcycle.utils.files import read_json


_ACTIVATIONS = {"silu": "silu", "openai_gelu": "gelu_pytorch_tanh"}
MODEL = "model.yaml"
_FIX = "put the Hugging Face config.json of the model beside the checkpoint's weights"
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, yaml.YAMLError)


def hf_config_of(context: Path, padded_vocab: int) -> dict[str, Any]:
    """Return the configuration of a dense model in Hugging Face's terms.

    The vocabulary is the one that the model was built with; where that was left to the tokenizer, the tokenizer's, if
    it lies in the context as `tokenizer.json`; else all rows of the embedding, padding included.

    Args:
        context: the checkpoint's `context/`.
        padded_vocab: rows of the embedding.

    Raises:
        CheckpointError: there is no `model.yaml`, or it describes no dense model that the mapping table knows.
    """
    settings, path = model_settings(context), context / MODEL
    if experts := settings.get("num_moe_experts"):
        raise CheckpointError(f"{path}: num_moe_experts", got=experts, expected=None, fix="give a dense parent")
    known = [family.nemo_module for family in parents() if family.nemo_module]
    if (module := family_of(settings)) not in known:
        raise CheckpointError(f"{path}: _target_", got=module, expected=" or ".join(known), fix=_FIX)
    return hf_config_from(settings, settings.get("vocab_size") or _tokenizer_size(context) or padded_vocab, path)


def model_settings(context: Path) -> dict[str, Any]:
    """Return the settings of NeMo's model configuration, by name.

    Raises:
        CheckpointError: there is no `model.yaml`, or it describes no language model.
    """
    path = context / MODEL
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))["config"]
        family_of(settings)
        return dict(settings)
    except FileNotFoundError:
        raise CheckpointError(str(path), got="no such file", expected="NeMo's model", fix=_FIX) from None
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def family_of(settings: dict[str, Any]) -> str:
    """Return NeMo's module of the model's configuration: `llama`."""
    return str(settings["_target_"].split(".")[-2])


def hf_config_from(settings: dict[str, Any], vocab_size: int, path: Path, fix: str = _FIX) -> dict[str, Any]:
    """Return settings under NeMo's names in Hugging Face's terms, as those of a dense model: experts do not count.

    Args:
        settings: as `model_settings` gives them; a family that is not known is read as Llama, or Qwen3.
        vocab_size: V.
        path: the file they are from.
        fix: what to do where no model of the mapping table is like that.

    Raises:
        CheckpointError: a size is missing, or a setting makes another function than that of the known families.
    """
    try:
        family, has_norms = find_nemo_module(family_of(settings)), bool(settings.get("qk_layernorm"))
        if family not in parents():
            family = qwen3.FAMILY if has_norms else llama.FAMILY
        activation = settings["activation_func"]["_target_"].rpartition(".")[2]
        layers, hidden, heads, neurons = (
            int(settings[key]) for key in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
        )
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    checks = [(name, got, taken) for name, got, taken, _ in refusals(settings.get, experts=False, parameters=False)]
    checks.append(("gated_linear_unit", settings.get("gated_linear_unit", True), True))
    checks.append(("softmax_scale", settings.get("softmax_scale"), None))
    checks.append(("qk_layernorm", has_norms, "query_norm" in family.names))
    checks += [
        ("activation_func", activation, activation if activation in _ACTIVATIONS else " or ".join(_ACTIVATIONS))
    ]
    for name, got, expected in checks:
        if got != expected:
            raise CheckpointError(f"{path}: {name}", got=got, expected=expected, fix=fix)
    window = settings.get("window_size")  # (tokens back, tokens ahead), -1 for all
    return {
        "architectures": [family.hf_class],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("num_query_groups") or heads,
        "head_dim": settings.get("kv_channels") or hidden // heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": bool(settings.get("share_embeddings_and_output_weights")),
        "hidden_act": _ACTIVATIONS[activation],
        "hidden_activation": _ACTIVATIONS[activation],
        "attention_bias": bool(settings.get("add_bias_linear")),
        "mlp_bias": bool(settings.get("add_bias_linear")),
        "qkv_bias": bool(settings.get("add_qkv_bias")),
        "qk_norm": has_norms,
        "zero_centered_norm": bool(settings.get("layernorm_zero_centered_gamma")),
        "rms_norm_eps": settings.get("layernorm_epsilon", 1e-5),
        "rope_theta": settings.get("rotary_base", 10000),
        "rope_scaling": _rope_scaling(settings),
        "max_position_embeddings": settings.get("seq_length", 4096),
        "sliding_window": int(window[0]) + 1 if window and int(window[0]) >= 0 else None,
    }


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        str(path),
        got=f"an unreadable description ({type(error).__name__})",
        expected="a NeMo 2 language model",
        fix=_FIX,
    )


def _rope_scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    if "old_context_len" not in config:
        return None
    return {
        "rope_type": "llama3",
        "factor": float(config["scale_factor"]),
        "low_freq_factor": float(config["low_freq_factor"]),
        "high_freq_factor": float(config["high_freq_factor"]),
        "original_max_position_embeddings": int(config["old_context_len"]),
    }


def _tokenizer_size(context: Path) -> int | None:
    """Return the number of a tokenizer's tokens, or None without one that says it."""
    for path in sorted(context.rglob("tokenizer.json")):
        try:
            tokenizer = read_json(path)
            numbers = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
            return 1 + int(max(numbers))
        except (UpcycleError, KeyError, TypeError, ValueError, AttributeError):
            return None
    return None
