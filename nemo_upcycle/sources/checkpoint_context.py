"""The settings that a checkpoint stores beside its weights, and checks that a dense parent and a spec agree with them.

NeMo writes `context/model.yaml`, Bridge writes `run_config.yaml`, and Megatron-LM writes its arguments into
`common.pt`. All are read as plain values: a class name is only text here and is compared with known names. (NeMo's
`io.json` is not read, because it can only be rebuilt by importing the classes that it names.)
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
#: PyTorch's or Megatron's activation function -> its name in the architecture.
_ACTIVATIONS = {"silu": "silu", "openai_gelu": "gelu_tanh"}
#: Setting -> value to assume if a checkpoint omits the setting.
_UNSAID = {
    **dict.fromkeys(("add_qkv_bias", "add_bias_linear", "share_embeddings_and_output_weights", "qk_layernorm"), False),
    **{"gated_linear_unit": True, "rotary_percent": 1.0, "moe_layer_freq": 1, "moe_router_topk": 2},
}
#: Architecture fields that change the function -> NeMo's setting. Rotary embedding and window are checked separately.
_FUNCTION = {
    name: FIELDS.get(name, "_target_")
    for name in (
        *("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "tied_embeddings"),
        *("activation", "gated", "qkv_bias", "ffn_bias", "qk_norm", "zero_centered_norm", "norm_eps"),
        *("scaled_embedding", "rope_pattern", "softmax_scale", "softmax_type", *MULTIPLIERS, *NORMS),
    )
} | {"window_pattern": "window_attn_skip_freq", "local_rope_theta": "transformer_layer_spec"}


class _Said:
    """Saved settings as attributes, in the form of a configuration.

    The layers of a HybridModel were already counted, so this class has no layer pattern.
    """

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
        path: file that the settings come from.
        settings: values by NeMo's setting names.
    """

    path: Path
    settings: dict[str, Any]

    @cached_property
    def dense(self) -> Architecture:
        """Architecture of the parent according to the checkpoint. Vocabulary and class are not known."""
        return self._architecture(1, _KEEP).dense

    def dense_model(self, padded_vocab: int) -> Architecture:
        """Return the architecture of NeMo's dense model.

        The vocabulary size is the size that the model was built with. If the settings leave the size to the tokenizer,
        it is read from `tokenizer.json` in the context. Without that file, the size is the number of embedding rows,
        padding included.

        Args:
            padded_vocab: number of embedding rows.

        Raises:
            CheckpointError: the model is not dense, or the mapping table does not know it.
        """
        if experts := self.settings.get("num_moe_experts"):
            raise CheckpointError(
                str(self.path),
                kind="refused",
                got=f"describes a model with {experts} experts",
                fix="give the model's dense parent",
            )
        known = [family.nemo_module for family in parents() if family.nemo_module]
        if self.module not in known:
            expected = " or ".join(known)
            raise CheckpointError(f"{self.path}: _target_", got=self.module, expected=expected, fix=_GIVE_CONFIG)
        return self._with_class(self._architecture(self._vocab_size(padded_vocab), _GIVE_CONFIG))

    def model(self, padded_vocab: int) -> Architecture:
        """Return the architecture of the model, dense or with experts.

        Args:
            padded_vocab: number of embedding rows.

        Raises:
            CheckpointError: the planner does not know such a model.
        """
        arch = self._architecture(self._vocab_size(padded_vocab), _GIVE_CONFIG)
        if not arch.num_experts:
            return self._with_class(arch)
        routing = {name: self.spec_fields[name][1] for name in ("router_score", "routed_scaling_factor")}
        return replace(arch, norm_topk=not self.settings.get("moe_router_pre_softmax"), **routing)

    def _with_class(self, arch: Architecture) -> Architecture:
        """Set the Hugging Face class of a dense model."""
        if family := find_dense(arch, self.module):
            return replace(arch, hf_class=family.hf_class)
        raise CheckpointError(
            f"{self.path}: {self.module}",
            kind="refused",
            got="does not have the layers of any dense model that this package knows",
            fix=_GIVE_CONFIG,
        )

    def _vocab_size(self, padded: int) -> int:
        return self.settings.get("vocab_size") or _tokenizer_size(self.path.parent) or padded

    @property
    def module(self) -> str:
        """NeMo's module of the model's configuration, such as `llama`."""
        return str(self.settings["_target_"].split(".")[-2])

    def _architecture(self, vocab_size: int, fix: str) -> Architecture:
        """Read the model's architecture, including experts but without a class.

        Args:
            vocab_size: vocabulary size V.
            fix: fix to suggest if a setting gives the model a function that no known family has.

        Raises:
            CheckpointError: a setting gives the model an unknown function, or has the wrong type.
        """
        get = self.settings.get
        if "M" in (pattern := get("hybrid_layer_pattern") or ""):
            raise SpecError(
                field="hybrid_layer_pattern",
                kind="refused",
                got=f"{pattern} has Mamba layers (M), and Megatron checkpoints with Mamba layers cannot be read",
                fix="keep the model in Megatron-Bridge, and upcycle from a Hugging Face folder",
            )
        for name, got, taken, _ in refusals(get, experts=False, parameters=False):
            raise CheckpointError(f"{self.path}: {name}", got=got, expected=taken, fix=fix)
        arch = self._read(lambda: architecture_of(_Said(self.settings), vocab_size))
        return replace(arch, **self._read(lambda: self._function(arch, fix)))

    def _function(self, arch: Architecture, fix: str) -> dict[str, Any]:
        """Read the fields that change the function of the layers but not their FLOPs."""
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
        """Values that a spec of the model must have: field -> (NeMo's setting, value). Empty for a dense model."""
        return self._read(self._spec_fields) if self.settings.get("num_moe_experts") else {}

    def _read(self, read: Callable[[], _Type]) -> _Type:
        try:
            return read()
        except (TypeError, ValueError, LookupError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(
                str(self.path),
                kind="state",
                got=f"does not describe a language model ({error})",
                fix="save the checkpoint again",
            ) from None

    def _spec_fields(self) -> dict[str, tuple[str, Any]]:
        get = self.settings.get
        for name, got, expected, _ in refusals(get, experts=True, parameters=False):
            raise CheckpointError(f"{self.path}: {name}", got=got, expected=expected, fix=_KEEP)
        return spec_fields(self.settings, self.dense.ffn_size, self.dense.num_layers)

    @property
    def router_aux_loss(self) -> float | None:
        """Coefficient of the load-balancing loss, or None if the checkpoint does not state a single number."""
        if self.settings.get("moe_router_load_balancing_type") == "none":
            return 0.0
        value = self.settings.get("moe_aux_loss_coeff")
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        return float(value) if isinstance(value, int | float) else None

    def spec_fields_of(self, parent: Architecture) -> dict[str, tuple[str, Any]]:
        """Return `spec_fields` for a model that was made from a parent.

        If the parent has experts, the widths of all experts come from the parent, so `granularity` and
        `shared_experts` are left out.
        """
        own = ("granularity", "shared_experts") if parent.num_experts else ()
        return {name: value for name, value in self.spec_fields.items() if name not in own}

    def spec(self, given: UpcycleSpec | None, parent: Architecture) -> UpcycleSpec | None:
        """Return the given spec, or else a spec with the fields that a Hugging Face class must know.

        Args:
            given: spec that the user states.
            parent: parent of the model. If the parent has experts and the model has no more experts than the parent,
                there is no spec.

        Raises:
            SpecError: the given spec contradicts the checkpoint.
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
        """Check that a dense parent's configuration describes the function that the checkpoint was trained with.

        Raises:
            CheckpointError: the configuration describes another function.
        """
        for name, got, setting, expected in self._differences(parent):
            raise CheckpointError(
                f"{name} of the parent {folder}",
                got=got,
                expected=f"{expected}, as {setting} in {self.path}",
                fix="give the model's own parent (--dense), or correct its config.json",
            )

    def _differences(self, parent: Architecture) -> Iterator[tuple[str, Any, str, Any]]:
        """Yield each difference: the field, the parent's value, NeMo's setting and the checkpoint's value."""
        for name, setting in _FUNCTION.items():
            got, expected = getattr(parent, name), getattr(self.dense, name)
            numbers = isinstance(got, float) and isinstance(expected, float)
            if got != expected and not (numbers and math.isclose(got, expected, rel_tol=1e-6)):
                yield name, got, setting, expected
        if parent.rope_theta != self.dense.rope_theta:
            yield "rope_theta", parent.rope_theta, "rotary_base", self.dense.rope_theta
        if not same_frequencies(self._read(lambda: rope_frequencies(self.dense)), parent):
            yield "rope_scaling", parent.rope_scaling, "rotary settings", self.dense.rope_scaling
        # NeMo's import makes the window one token too large, because Megatron does not count the current token.
        tokens = min(parent.max_positions, self.dense.max_positions)
        seen, wanted = (min(arch.sliding_window or tokens, tokens) for arch in (self.dense, parent))
        if not seen - 1 <= wanted <= seen:
            yield "sliding_window", parent.sliding_window, "window_size", self.dense.sliding_window

    @property
    def notes(self) -> tuple[str, ...]:
        """Differences between the exported model and the model in training, and assumptions about the checkpoint."""
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
    """Read the model settings of a NeMo or Megatron checkpoint, or return None if it has none.

    Raises:
        CheckpointError: the checkpoint has a description that cannot be read.
    """
    found = saved_settings(checkpoint, fix=f"copy the checkpoint again; to read a dense parent, {_GIVE_CONFIG}")
    return CheckpointContext(*found) if found else None


def _tokenizer_size(context: Path) -> int | None:
    """Return the number of tokens from a `tokenizer.json` in the context, or None if no such file states it."""
    for path in sorted(context.rglob("tokenizer.json")):
        try:
            tokenizer = read_json(path)
            numbers = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
            return 1 + int(max(numbers))
        except (UpcycleError, KeyError, TypeError, ValueError, AttributeError):
            return None
    return None
