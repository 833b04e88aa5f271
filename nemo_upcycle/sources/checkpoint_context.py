"""What a checkpoint says of its own model beside the weights, and whether a dense parent and a spec agree with it.

NeMo writes `context/model.yaml`, Bridge `run_config.yaml`, Megatron-LM its arguments into `common.pt`. All are read as
plain values: a class name is a text here, compared with known ones. (NeMo's `io.json` is to be rebuilt by importing
the classes that it names, and is not read.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.config_fields import refusals
from nemo_upcycle.models.families import find_dense, find_nemo_module, parents
from nemo_upcycle.models.layer_settings import MULTIPLIERS, NORMS, layers_with
from nemo_upcycle.models.megatron_config import FIELDS, architecture_of, spec_fields
from nemo_upcycle.models.rotary import rope_frequencies, same_frequencies, scaling_of
from nemo_upcycle.sources.saved_settings import saved_settings
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import read_json


_Type = TypeVar("_Type")
_KEEP = "keep the model in NeMo, which can train and evaluate it"
_GIVE_CONFIG = "put the Hugging Face config.json of the model beside the checkpoint's weights"
#: PyTorch's and Megatron's functions -> the architecture's.
_ACTIVATIONS = {"silu": "silu", "openai_gelu": "gelu_tanh"}
#: What a setting is that a checkpoint does not say.
_UNSAID = {
    **dict.fromkeys(("add_qkv_bias", "add_bias_linear", "share_embeddings_and_output_weights", "qk_layernorm"), False),
    **{"gated_linear_unit": True, "rotary_percent": 1.0, "moe_layer_freq": 1, "moe_router_topk": 2},
}
#: Fields of an architecture that make the function -> NeMo's setting; rotary embedding and window are checked apart.
_FUNCTION = {
    name: FIELDS.get(name, "_target_")
    for name in (
        *("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "tied_embeddings"),
        *("activation", "gated", "qkv_bias", "ffn_bias", "qk_norm", "zero_centered_norm", "norm_eps"),
        *("scaled_embedding", "rope_pattern", "softmax_scale", *MULTIPLIERS, *NORMS),
    )
} | {"window_pattern": "window_attn_skip_freq", "local_rope_theta": "transformer_layer_spec"}


class _Said:
    """Saved settings as attributes, as a configuration has them; a HybridModel's layers are counted before."""

    hybrid_layer_pattern = None

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        value = self._settings.get(name)
        return _UNSAID.get(name) if value is None else value


@dataclass(frozen=True)
class CheckpointContext:
    """The settings of a checkpoint's model.

    Args:
        path: the file that they are from.
        settings: values by NeMo's names.
    """

    path: Path
    settings: dict[str, Any]

    @cached_property
    def dense(self) -> Architecture:
        """The parent's architecture, as the checkpoint has it; its vocabulary and its class are not known."""
        return self._architecture(1, _KEEP).dense

    def dense_model(self, padded_vocab: int) -> Architecture:
        """Return the architecture of NeMo's dense model.

        The vocabulary is the one that the model was built with; where that was left to the tokenizer, the tokenizer's,
        if it lies in the context as `tokenizer.json`; else all rows of the embedding, padding included.

        Args:
            padded_vocab: rows of the embedding.

        Raises:
            CheckpointError: it is no dense model that the mapping table knows.
        """
        if experts := self.settings.get("num_moe_experts"):
            raise CheckpointError(
                str(self.path),
                kind="refused",
                got=f"describes a model with {experts} experts",
                fix="give its dense parent",
            )
        known = [family.nemo_module for family in parents() if family.nemo_module]
        if self.module not in known:
            expected = " or ".join(known)
            raise CheckpointError(f"{self.path}: _target_", got=self.module, expected=expected, fix=_GIVE_CONFIG)
        return self._with_class(self._architecture(self._vocab_size(padded_vocab), _GIVE_CONFIG))

    def model(self, padded_vocab: int) -> Architecture:
        """Return the architecture of the model, dense or with experts.

        Args:
            padded_vocab: rows of the embedding.

        Raises:
            CheckpointError: it is no model that the planner knows.
        """
        arch = self._architecture(self._vocab_size(padded_vocab), _GIVE_CONFIG)
        if not arch.num_experts:
            return self._with_class(arch)
        routing = {name: self.spec_fields[name][1] for name in ("router_score", "routed_scaling_factor")}
        return replace(arch, norm_topk=not self.settings.get("moe_router_pre_softmax"), **routing)

    def _with_class(self, arch: Architecture) -> Architecture:
        """Name the Hugging Face class of a dense model."""
        if family := find_dense(arch, self.module):
            return replace(arch, hf_class=family.hf_class)
        raise CheckpointError(
            f"{self.path}: {self.module}",
            kind="refused",
            got="has the layers of no dense class that is known",
            fix=_GIVE_CONFIG,
        )

    def _vocab_size(self, padded: int) -> int:
        return self.settings.get("vocab_size") or _tokenizer_size(self.path.parent) or padded

    @property
    def module(self) -> str:
        """NeMo's module of the model's configuration: `llama`."""
        return str(self.settings["_target_"].split(".")[-2])

    def _architecture(self, vocab_size: int, fix: str) -> Architecture:
        """Read the model's architecture, experts included; it has no class.

        Args:
            vocab_size: V.
            fix: what to do where a setting makes another function than that of the known families.

        Raises:
            CheckpointError: a setting does, or is of another type.
        """
        get = self.settings.get
        if "M" in (pattern := get("hybrid_layer_pattern") or ""):
            raise SpecError(
                field="hybrid_layer_pattern",
                kind="refused",
                got=f"{pattern} has Mamba layers (M), and Megatron checkpoints with them are not read",
                fix="keep the model in Megatron-Bridge, and upcycle from a Hugging Face folder",
            )
        for name, got, taken, _ in refusals(get, experts=False, parameters=False):
            raise CheckpointError(f"{self.path}: {name}", got=got, expected=taken, fix=fix)
        arch = self._read(lambda: architecture_of(_Said(self.settings), vocab_size))
        return replace(arch, **self._read(lambda: self._function(arch, fix)))

    def _function(self, arch: Architecture, fix: str) -> dict[str, Any]:
        """Read the fields that decide what layers compute, and no FLOPs."""
        get, family = self.settings.get, find_nemo_module(self.module)
        back, _ = get("window_size") or (-1, -1)  # tokens back, tokens ahead; -1 for all
        sees = layers_with(get("window_attn_skip_freq"), arch.num_layers)
        layers = layers if isinstance(layers := get("transformer_layer_spec"), dict) else {}
        activation = self.settings["activation_func"]["_target_"].rpartition(".")[2]
        if activation not in _ACTIVATIONS:
            expected = " or ".join(_ACTIVATIONS)
            raise CheckpointError(f"{self.path}: activation_func", got=activation, expected=expected, fix=fix)
        return {
            "activation": _ACTIVATIONS[activation],
            "zero_centered_norm": bool(get("layernorm_zero_centered_gamma")),
            "scaled_embedding": bool(family and family.defaults.get("scaled_embedding")),
            "norm_eps": float(get("layernorm_epsilon", 1e-5)),
            "rope_theta": float(get("rotary_base", 10000)),
            "rope_scaling": layers.get("rope_scaling") or scaling_of(self.settings),
            "local_rope_theta": layers.get("local_rope_theta"),
            "max_positions": int(get("max_position_embeddings" if get("short_factor") else "seq_length", 4096)),
            "sliding_window": int(back) + 1 if int(back) >= 0 else None,
            "window_pattern": sees if int(back) >= 0 and not all(sees) else None,
        }

    @cached_property
    def spec_fields(self) -> dict[str, tuple[str, Any]]:
        """What a spec of the model must say, field -> (NeMo's setting, value). Empty for a dense model."""
        return self._read(self._spec_fields) if self.settings.get("num_moe_experts") else {}

    def _read(self, read: Callable[[], _Type]) -> _Type:
        try:
            return read()
        except (TypeError, ValueError, LookupError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(
                str(self.path), kind="state", got=f"does not describe a language model ({error})", fix="save it again"
            ) from None

    def _spec_fields(self) -> dict[str, tuple[str, Any]]:
        get = self.settings.get
        for name, got, expected, _ in refusals(get, experts=True, parameters=False):
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

    def spec_fields_of(self, parent: Architecture) -> dict[str, tuple[str, Any]]:
        """Return `spec_fields` of what was made of a parent; one with experts has widths of its own."""
        own = ("granularity", "shared_experts") if parent.num_experts else ()
        return {name: value for name, value in self.spec_fields.items() if name not in own}

    def spec(self, given: UpcycleSpec | None, parent: Architecture) -> UpcycleSpec | None:
        """Return the spec of the model: the one given, else what a Hugging Face class must know of it.

        Args:
            given: what the user says it is.
            parent: what it was made of; a parent with experts that was trained as it is has no spec.

        Raises:
            SpecError: the one given contradicts the checkpoint.
        """
        fields = self.spec_fields_of(parent)
        if given is None:
            if parent.num_experts and parent.num_experts == self.settings.get("num_moe_experts"):
                return None
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
                    expected=f"{expected}, as {setting} in {self.path}",
                    fix=f"omit <{name}>, or give the spec or receipt of the upcycling",
                )
        return given

    def require_parent(self, parent: Architecture, folder: Path) -> None:
        """Check that a dense parent's configuration makes the function that the checkpoint was trained with.

        Raises:
            CheckpointError: it does not.
        """
        for name, got, setting, expected in self._differences(parent):
            raise CheckpointError(
                f"{name} of the parent {folder}",
                got=got,
                expected=f"{expected}, as {setting} in {self.path}",
                fix="give the model's own parent (--dense), or correct its config.json",
            )

    def _differences(self, parent: Architecture) -> Iterator[tuple[str, Any, str, Any]]:
        """Yield what differs: field, the parent's value, NeMo's setting, the checkpoint's value."""
        for name, setting in _FUNCTION.items():
            got, expected = getattr(parent, name), getattr(self.dense, name)
            numbers = isinstance(got, float) and isinstance(expected, float)
            if got != expected and not (numbers and math.isclose(got, expected, rel_tol=1e-6)):
                yield name, got, setting, expected
        if parent.rope_theta != self.dense.rope_theta:
            yield "rope_theta", parent.rope_theta, "rotary_base", self.dense.rope_theta
        if not same_frequencies(self._read(lambda: rope_frequencies(self.dense)), parent):
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
            notes.append(
                f"moe_expert_capacity_factor={factor:g} dropped tokens in training; the exported model drops none"
            )
        if self.module != "megatron" and find_nemo_module(self.module) is None:
            notes.append(f"{self.settings['_target_']} is unknown and read as a Megatron model with these settings")
        return tuple(notes)


def read_context(checkpoint: Path) -> CheckpointContext | None:
    """Read the settings of the model of a NeMo or Megatron checkpoint; None where it has none.

    Raises:
        CheckpointError: there is a description, and it cannot be read.
    """
    found = saved_settings(checkpoint, fix=f"copy the checkpoint again; to read a dense parent, {_GIVE_CONFIG}")
    return CheckpointContext(*found) if found else None


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
