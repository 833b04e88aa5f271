"""What a checkpoint says of its own model beside the weights, and whether a dense parent and a spec agree with it.

NeMo writes `context/model.yaml`, Bridge `run_config.yaml`, Megatron-LM its arguments into `common.pt`. All are
read as plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.architecture import Architecture, architecture_from_config
from nemo_upcycle.models.families import find_family, find_nemo_module
from nemo_upcycle.models.hybrid import HybridLayers
from nemo_upcycle.models.megatron_config import FIELDS, NO_SPEC_HAS, spec_fields
from nemo_upcycle.models.rotary import rope_frequencies, same_frequencies
from nemo_upcycle.sources.inert_pickle import Inert, read_saved
from nemo_upcycle.sources.nemo_context import MODEL, family_of, hf_config_from, model_settings
from nemo_upcycle.spec import UpcycleSpec


_KEEP = "keep the model in NeMo: it trains and evaluates there"
#: Fields of an architecture that make the function -> NeMo's setting; rotary embedding and window are checked apart.
_FUNCTION = {
    name: FIELDS.get(name, "_target_")
    for name in (
        *("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "tied_embeddings"),
        *("activation", "qkv_bias", "ffn_bias", "qk_norm", "zero_centered_norm", "norm_eps", "scaled_embedding"),
    )
}
#: Bridge's configurations of the models that are known here.
_BRIDGE_MODELS = ("GPTModelProvider", "GPTModelConfig", "HybridModelProvider", "HybridModelConfig")
#: Megatron-LM's argument -> NeMo's setting, where the names differ.
_ARGUMENTS = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "swiglu": "gated_linear_unit",
    "num_experts": "num_moe_experts",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}


@dataclass(frozen=True)
class CheckpointContext:
    """The settings of a checkpoint's model.

    Args:
        path: the file that they are from.
        settings: by NeMo's names.
    """

    path: Path
    settings: dict[str, Any]

    @cached_property
    def dense(self) -> Architecture:
        """The parent's architecture, as the checkpoint has it; its vocabulary is not known."""
        config = self._read(lambda: hf_config_from(self.settings, 1, self.path, _KEEP))
        family = find_family(*config["architectures"])
        if config["sliding_window"] and family and family.windowed_class:
            config["architectures"] = [family.windowed_class]
        return architecture_from_config(config, str(self.path))

    @cached_property
    def spec_fields(self) -> dict[str, tuple[str, Any]]:
        """What a spec of the model must say, field -> (NeMo's setting, value). Empty for a dense model."""
        return self._read(self._spec_fields) if self.settings.get("num_moe_experts") else {}

    def _read(self, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return read()
        except (TypeError, ValueError, LookupError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(
                str(self.path),
                got=f"settings of other types ({error})",
                expected="those of a language model",
                fix="save it again",
            ) from None

    def _spec_fields(self) -> dict[str, tuple[str, Any]]:
        get = self.settings.get
        wrong = [(name, value, get(name)) for name, value in NO_SPEC_HAS.items() if (get(name) or value) != value]
        if get("moe_router_load_balancing_type") == "sinkhorn":
            wrong.append(("moe_router_load_balancing_type", "aux_loss or none", "sinkhorn"))
        for name, expected, got in wrong:
            raise CheckpointError(f"{self.path}: {name}", got=got, expected=expected, fix=_KEEP)
        return spec_fields(self.settings, self.dense.ffn_size, self.dense.num_layers)

    @property
    def router_aux_loss(self) -> float | None:
        """The coefficient of the load-balancing loss; None where the checkpoint does not say one number."""
        if self.settings.get("moe_router_load_balancing_type") == "none":
            return 0.0
        value = self.settings.get("moe_aux_loss_coeff")
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        return float(value) if isinstance(value, int | float) else None

    def spec(self, given: UpcycleSpec | None = None) -> UpcycleSpec | None:
        """Return the spec of the model: the one given, else what a Hugging Face class must know of it.

        Raises:
            SpecError: the one given contradicts the checkpoint.
        """
        fields = self.spec_fields
        if given is None:
            return UpcycleSpec(**{name: value for name, (_, value) in fields.items()}) if fields else None
        layers = self.dense.num_layers
        for name, (setting, expected) in fields.items():
            got = getattr(given, name)
            if name == "moe_layers":
                differs = replace(given, moe_layers=expected).moe_pattern(layers) != given.moe_pattern(layers)
            else:
                differs = got != expected
            if differs:
                raise SpecError(
                    field=name,
                    got=got,
                    expected=f"{expected} ({setting} in {self.path})",
                    fix=f"omit <{name}>, or give the spec or receipt that the model was upcycled by",
                )
        return given

    def require_parent(self, parent: Architecture, folder: Path) -> None:
        """Check that a dense parent's configuration makes the function that the checkpoint was trained with.

        Raises:
            CheckpointError: it does not.
        """
        for name, got, setting, expected in self._differences(parent):
            raise CheckpointError(
                f"{name} of the dense parent {folder}",
                got=got,
                expected=f"{expected} ({setting} in {self.path})",
                fix="give the parent that the model was made from (--dense), or correct its config.json",
            )

    def _differences(self, parent: Architecture) -> Iterator[tuple[str, Any, str, Any]]:
        """Yield what differs: field, the parent's value, NeMo's setting, the checkpoint's value."""
        for name, setting in _FUNCTION.items():
            got, expected = getattr(parent, name), getattr(self.dense, name)
            if got != expected and not (isinstance(got, float) and math.isclose(got, expected, rel_tol=1e-6)):
                yield name, got, setting, expected
        if parent.rope_theta != self.dense.rope_theta:
            yield "rope_theta", parent.rope_theta, "rotary_base", self.dense.rope_theta
        if not same_frequencies(rope_frequencies(self.dense), parent):
            yield "rope_scaling", parent.rope_scaling, "rotary settings", self.dense.rope_scaling
        # NeMo's import of a window forgets that Megatron counts the tokens before the current one only: one too many.
        tokens = min(parent.max_positions, self.dense.max_positions)
        seen, wanted = (min(arch.sliding_window or tokens, tokens) for arch in (self.dense, parent))
        if not seen - 1 <= wanted <= seen:
            yield "sliding_window", parent.sliding_window, "window_size", self.dense.sliding_window

    @property
    def notes(self) -> tuple[str, ...]:
        """What the exported model does otherwise than the checkpoint in training, and what is taken for granted."""
        notes = []
        factor = self.settings.get("moe_expert_capacity_factor")
        if self.spec_fields and factor is not None and factor >= 0:
            notes.append(f"moe_expert_capacity_factor={factor:g} dropped tokens in training; here none is dropped")
        module = family_of(self.settings)
        if module != "megatron" and find_nemo_module(module) is None:
            notes.append(f"{self.settings['_target_']} is not known: it is taken for a Llama with these settings")
        return tuple(notes)


def read_context(checkpoint: Path) -> CheckpointContext | None:
    """Return what a NeMo or Megatron checkpoint says of its model; None where it says nothing.

    Raises:
        CheckpointError: there is a description, and it cannot be read.
    """
    context = checkpoint / "context"
    if (context / MODEL).is_file():
        return CheckpointContext(context / MODEL, model_settings(context))
    if (path := checkpoint / "run_config.yaml").is_file():
        return CheckpointContext(path, _bridge_settings(path))
    for path in (checkpoint / "common.pt", checkpoint / "weights/common.pt"):
        if path.is_file() and (settings := _megatron_settings(path)):
            return CheckpointContext(path, settings)
    return None


def _bridge_settings(path: Path) -> dict[str, Any]:
    """Return the settings of Bridge's model, by Megatron's names, which are NeMo's."""
    try:
        model = dict(yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
        settings = model | dict(model.get("transformer") or {})  # of a builder's configuration, beside the model's
        if model["_target_"].rpartition(".")[2] in _BRIDGE_MODELS:  # others compute otherwise
            settings["_target_"] = "megatron.GPTModel"
        # A builder's configuration is written without it: then it is that of nearly every parent.
        activation = settings.setdefault("activation_func", {"_target_": "torch.nn.functional.silu"})["_target_"]
        int(settings["num_layers"])
        settings |= _dense_layers(settings)
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
        settings |= _megatron_rope_scaling(settings.get("rope_scaling_factor", 8.0))
    return settings


def _megatron_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings among a Megatron-LM run's arguments; None where there are none."""
    try:
        saved = read_saved(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(path), got=f"unreadable ({error})", expected="what torch.save wrote", fix="copy the checkpoint again"
        ) from None
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
        settings |= _megatron_rope_scaling(given.get("rope_scaling_factor", 8.0))
    return settings


def _dense_layers(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of layers that a GPTModel has which computes the same as a HybridModel; none for others."""
    hybrid = HybridLayers(pattern) if (pattern := settings.get("hybrid_layer_pattern")) else None
    if hybrid is None:
        return {}
    return {"num_layers": hybrid.num_layers, "moe_layer_freq": [int(is_moe) for is_moe in hybrid.moe_pattern]}


def _megatron_rope_scaling(factor: float) -> dict[str, Any]:
    """Return NeMo's settings of the scaling of rotary frequencies that Megatron has: Llama 3.1's, with any factor."""
    return {"scale_factor": factor, "old_context_len": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
