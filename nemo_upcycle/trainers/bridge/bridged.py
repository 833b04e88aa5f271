"""Parents for which this package has no family, filled by what Megatron-Bridge knows of their class.

Bridge's provider of the dense class gets experts. Its own loader fills everything but the networks, by its mappings;
these say, too, which tensors the networks are, and those become experts by the plan of a tensor, as any parent's: each
rank reads its slices, each once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.init.calibration_file import calibration_of
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.config_fields import table
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import layers_with
from nemo_upcycle.models.mapping import mapping_of
from nemo_upcycle.models.mapping_table import ParamMapping
from nemo_upcycle.models.megatron_config import architecture_of, check_spec, moe_fields
from nemo_upcycle.sources import DenseSource, open_dense
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.tensor_plan import ModelPlan


#: On a provider that `bridged_provider` has made.
_MARK = "filled_by_bridge"
_NETWORK_ROLES = ("fc1", "fc1_bias", "fc2", "fc2_bias")


def needs_bridge(folder: Path) -> bool:
    """Return whether this package by itself cannot make Bridge's model of a folder: it has no family of the class.

    Or Megatron's GPTModel has no setting for what the class does, as for Gemma's scaled embedding.
    """
    if not (folder / "config.json").is_file():
        return False
    try:
        return read_architecture(folder).scaled_embedding
    except CheckpointError as error:
        return error.subject.endswith(": architectures")


def is_bridged(model: Any, folder: Path) -> bool:
    """Return whether a model is filled by Bridge's mappings.

    Args:
        model: the provider, or another configuration of a model.
        folder: its parent.
    """
    return getattr(model, _MARK, False) or needs_bridge(folder)


def bridged_provider(folder: str | Path, spec: UpcycleSpec | None, **changes: Any) -> GPTModelProvider:
    """Make Bridge's provider of a dense class, with experts; of a model with other parts, the whole model's.

    `upcycled_provider` calls it for parents that this package has no family for. Of a vision-language model call it
    yourself to keep what sees, which `upcycled_provider` leaves out.

    Args:
        folder: the dense checkpoint's folder.
        spec: how to upcycle it; None for the dense model itself.
        changes: fields of the provider that are to differ: layout, precision, kernels.

    Raises:
        CheckpointError: Bridge does not know the class either.
        SpecError: the class has experts already, or its layers in Bridge cannot get any.
    """
    parent = BridgedParent.of(Path(folder))
    provider = parent.make_provider()
    fields: dict[str, Any] = {"bf16": True, "fp16": False, "params_dtype": torch.bfloat16, "mtp_num_layers": None}
    fields |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "should_pad_vocab": False}
    if spec:
        fields |= moe_fields(spec, provider.ffn_hidden_size, provider.num_layers)
        fields |= {"moe_router_dtype": "fp32"} if spec.needs_float32_routing else {}
        fields |= {"moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True, "moe_permute_fusion": True}
        fields |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
        if spec.moe_layers != "all" and provider.transformer_layer_spec is default_layer_spec:
            fields["transformer_layer_spec"] = functools.partial(
                get_gpt_decoder_block_spec, use_transformer_engine=True, normalization=provider.normalization
            )
    for name, value in (fields | changes).items():
        if name not in provider.__dataclass_fields__:
            raise SpecError.unknown("config.model", name, provider.__dataclass_fields__)
        setattr(provider, name, value)
    setattr(provider, _MARK, True)
    if spec:
        parent.check_layers(provider)
    return provider


@dataclass(frozen=True)
class BridgedParent:
    """A dense parent as Bridge knows it.

    Args:
        folder: its folder.
        bridge: Bridge's of its class.
    """

    folder: Path
    bridge: AutoBridge

    @staticmethod
    @functools.cache
    def of(folder: Path) -> BridgedParent:
        """Open a folder.

        Raises:
            CheckpointError: Bridge does not know the class.
            SpecError: it has experts already.
        """
        where = f"{folder}: architectures"
        try:
            bridge = AutoBridge.from_hf_pretrained(str(folder))
            parent = BridgedParent(folder, bridge)
            own = parent.make_provider()
        except (ValueError, OSError, AttributeError, AssertionError, KeyError) as error:
            raise CheckpointError(
                where,
                got=f"a model that Megatron-Bridge does not take ({str(error).strip().splitlines()[0]})",
                expected="a class that this package has a family for, or Bridge a bridge",
                fix="use another checkpoint, or give the class a family (register of nemo_upcycle.models.families)",
            ) from None
        if not isinstance(own, GPTModelProvider):
            raise SpecError(
                "dense",
                got=f"{parent.hf_class}, by Bridge's {type(own).__name__}",
                expected="a class whose model in Bridge is a GPTModel, or has one in it",
                fix="use another checkpoint",
            )
        if experts := own.num_moe_experts:
            raise SpecError(
                "dense",
                got=f"{parent.hf_class}, with {experts} experts",
                expected="a dense model: only parents of this package's own families get more experts",
                fix="give a dense parent",
            )
        return parent

    @property
    def hf_class(self) -> str:
        """The class in `config.json`."""
        return str((self.bridge.hf_pretrained.config.architectures or [""])[0])

    def make_provider(self) -> GPTModelProvider:
        """Make Bridge's provider of the dense model."""
        return self.bridge.to_megatron_provider(load_weights=False)

    @functools.cached_property
    def architecture(self) -> Architecture:
        """The sizes of its text model."""
        own = self.make_provider()
        window = own.window_size[0] + 1 if own.window_size else None
        return replace(
            architecture_of(own, own.vocab_size),
            activation=own.activation_func.__name__,
            max_positions=own.seq_length,
            sliding_window=window,
            window_pattern=layers_with(own.window_attn_skip_freq, own.num_layers) if window else None,
        )

    def open(self) -> SafetensorsFolder:
        """Open its files, under their own names."""
        return SafetensorsFolder(self.folder, self.architecture)

    def check_layers(self, provider: GPTModelProvider) -> None:
        """Check that the layers which Bridge makes for the class get experts, as far as they say so unbuilt.

        Raises:
            SpecError: they do not.
        """
        layers: Any = provider.transformer_layer_spec
        if "num_experts=None" in inspect.getsource(type(provider).provide):  # where some make their layers
            raise self.without_experts(type(provider).__name__)
        if callable(layers) and [*inspect.signature(layers).parameters] == ["config"]:
            made = layers(provider)
            for layer in getattr(made, "layer_specs", [made]):
                network = layer.submodules.mlp
                kind = getattr(network, "func", getattr(network, "module", network))
                if not (isinstance(kind, type) and issubclass(kind, MoELayer)):
                    raise self.without_experts(layers.__name__)

    def without_experts(self, what: str) -> SpecError:
        """Return the error for layers that stay dense."""
        return SpecError(
            "dense",
            got=f"{self.hf_class}, whose layers in Megatron-Bridge ({what}) ignore num_moe_experts",
            expected="layers that get experts: what would train is the dense model",
            fix="use another checkpoint, or NeMo, if this package has a family for the class",
        )

    def check(self, model: Any, spec: UpcycleSpec | None) -> None:
        """Check that a model's configuration is still Bridge's of this class, but for what a spec makes of it.

        Raises:
            SpecError: it is not.
        """
        own, meanings = self.make_provider(), table()
        names = {
            *meanings["handled"]["models.megatron_config.check_model"],
            *meanings["refused"]["changes the function"],
        }
        names |= {"window_size", "window_attn_skip_freq"}
        values = {name: getattr(own, name, None) for name in names if not name.startswith("moe_")}
        fixed = {name: value for name, value in values.items() if value is not None}
        wanted = moe_fields(spec, own.ffn_hidden_size, own.num_layers) if spec else {}
        for name in sorted(fixed | wanted):
            got, value = getattr(model, name, None), (fixed | wanted)[name]
            if got != value and (got or value) and name != "moe_layer_freq":  # which check_spec reads
                expected = f"{value}, as Bridge makes {self.hf_class} and the spec says"
                raise SpecError(field=f"config.model.{name}", got=got, expected=expected, fix="leave it at that")
        if spec and calibration_of(spec):
            expected = "one that needs no calibration: the parent is not run layer by layer"
            raise SpecError(field="router_init", got=spec.router_init, expected=expected, fix="choose another")
        check_spec(_Unfixed(model, fixed), spec)

    def plan(self, spec: UpcycleSpec, prefix: str) -> BridgedPlan:
        """Plan what becomes of its networks.

        Args:
            spec: how to upcycle it.
            prefix: how names of the text model begin in Bridge's.

        Raises:
            CheckpointError: the networks are made of tensors in a way that no slice is.
        """
        mappings = {one.megatron_param: one for one in self.bridge._model_bridge.mapping_registry().get_all_mappings()}
        arch, networks = self.architecture, {}
        for role in _NETWORK_ROLES:
            ours = mapping_of(role, arch)
            theirs = mappings.get(f"{prefix}decoder.layers.*.{ours.megatron[0]}")
            if theirs is None:
                continue
            names = tuple(theirs.hf_param.values()) if isinstance(theirs, GatedMLPMapping) else (theirs.hf_param,)
            is_plain = type(theirs) is GatedMLPMapping or (type(theirs) is AutoMapping and not theirs.permute_dims)
            if not is_plain or len(names) != len(ours.parts):
                raise CheckpointError(
                    f"networks of {self.hf_class}",
                    got=f"{theirs.hf_param}, by Bridge's {type(theirs).__name__}",
                    expected="a tensor each for gate, up and down projection",
                    fix="use another checkpoint",
                )
            networks[role] = replace(ours, hf=tuple(name.replace("*", "{layer}") for name in names))
        return BridgedPlan(arch, replace(arch.upcycled(spec), hf_class=""), spec, 1, networks)


@dataclass(frozen=True)
class BridgedPlan(ModelPlan):
    """The plan of a model whose networks are named by Bridge's mappings.

    Args:
        networks: role in the mapping table -> the parameter with its tensors.
    """

    networks: Mapping[str, ParamMapping] = field(default_factory=dict)

    def source_of(self, role: str, dense: Architecture) -> ParamMapping:
        """Return the dense parameter that an expert's is made of."""
        if role not in self.networks:
            raise CheckpointError(f"{role} of the parent's networks", got="none in Bridge's mappings", expected="one")
        return self.networks[role]


class _Unfixed:
    """A configuration without the settings that were compared already with those of Bridge's own model."""

    def __init__(self, config: Any, compared: Collection[str]) -> None:
        self._config, self._compared = config, {*compared} & table()["refused"]["changes the function"].keys()

    def __getattr__(self, name: str) -> Any:
        return None if name in self._compared else getattr(self._config, name)


def open_parent(model: Any, folder: Path) -> DenseSource:
    """Open a parent's files, of a class that this package knows or of one that Bridge does."""
    return BridgedParent.of(folder).open() if is_bridged(model, folder) else open_dense(folder)
