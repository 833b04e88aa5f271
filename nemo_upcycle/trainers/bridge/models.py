"""Bridge's configurations of upcycled and dense models, made from a dense checkpoint's architecture and a spec."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.gemma.gemma_provider import GemmaModelProvider
from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hybrid.hybrid_builder import HybridModelConfig
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.bridge.models.transformer_config import TransformerConfig
from megatron.core.activations import squared_relu
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.activation import activation_function
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.balancing import BALANCING_LOSS
from nemo_upcycle.models.growth import router_dtype
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import window_fields
from nemo_upcycle.models.megatron_config import hybrid_symbols, megatron_fields, router_fields
from nemo_upcycle.online.decoder_layers import decoder_layers, layers_of
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.bridge.hooks import refuse_first_step


#: Megatron's fixed values for the frequencies of rotary scaling, the same as in Llama 3.1. Only the factor can be set.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
#: Settings for GPUs, with and without experts. The loss coefficient is the same as in this package's recipes.
_KERNELS: dict[str, Any] = {
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bias_dropout_fusion": True,
    "persist_layer_norm": True,
    "apply_rope_fusion": True,
}
_MOE_KERNELS: dict[str, Any] = {
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_token_dispatcher_type": "alltoall",
    **BALANCING_LOSS,
}


def upcycled_provider(
    dense: str | Path | Architecture, spec: UpcycleSpec | None, **changes: Any
) -> GPTModelProvider | HybridModelProvider:
    """Return Bridge's provider of the model that a spec makes from a dense checkpoint.

    With a `hybrid_layer_pattern` among the changes, the provider is a HybridModel's, otherwise a GPTModel's. For a
    parent with Mamba layers, the provider is always a HybridModel's. By default, this provider has the parent's
    pattern, without borders between stages. A model made from a folder trains only if its run has filled the model
    (`with_upcycling`) or a checkpoint was loaded. Otherwise the model refuses its first step.

    Args:
        dense: folder of the dense checkpoint, or its architecture; a model made from an architecture may start from
            random weights.
        spec: how to upcycle the checkpoint; None for the dense model itself.
        changes: fields of the provider that are to differ: layout, precision, kernels.

    Raises:
        SpecError: Bridge's model class cannot represent the model.

    Example:
        >>> upcycled_provider("/models/Llama-3-8B", UpcycleSpec(), expert_model_parallel_size=8)  # doctest: +SKIP
        >>> pattern = hybrid_pattern([True] * 32, segments=4)  # of nemo_upcycle.models.hybrid
        >>> upcycled_provider("/models/Llama-3-8B", UpcycleSpec(), hybrid_layer_pattern=pattern)  # doctest: +SKIP
    """
    parent = _architecture(dense)
    model = provider_of(Origin(parent, spec), **changes)
    if not isinstance(dense, Architecture):
        refuse_first_step(model, str(dense))
    return model


def upcycled_config(
    dense: str | Path | Architecture, spec: UpcycleSpec | None, **changes: Any
) -> GPTModelConfig | HybridModelConfig:
    """Return the same model as a configuration of Bridge's builders, which are to replace Bridge's providers.

    Args:
        dense: see `upcycled_provider`.
        spec: how to upcycle the checkpoint; None for the dense model itself.
        changes: fields of the configuration or of its `TransformerConfig` that are to differ.

    Raises:
        SpecError: Bridge's model class cannot represent the model.
    """
    model = builder_of(Origin(_architecture(dense), spec), **changes)
    if not isinstance(dense, Architecture):
        refuse_first_step(model, str(dense))
    return model


@dataclass(frozen=True)
class Origin:
    """The parent and the spec that a model was made from, kept in the model as `_made_of`, which Bridge does not save.

    Args:
        parent: architecture of the dense checkpoint.
        spec: how the checkpoint is upcycled; None for the dense model itself.
    """

    parent: Architecture
    spec: UpcycleSpec | None

    @cached_property
    def arch(self) -> Architecture:
        """The architecture of the model."""
        return self.parent.upcycled(self.spec) if self.spec else self.parent


def provider_of(origin: Origin, **changes: Any) -> GPTModelProvider | HybridModelProvider:
    """Return a provider without hooks that fill the model or refuse a step; see `upcycled_provider`."""
    model: GPTModelProvider | HybridModelProvider
    arch = origin.arch
    if not (arch.mamba or "hybrid_layer_pattern" in changes):
        kind = GemmaModelProvider if arch.scaled_embedding else GPTModelProvider  # Gemma multiplies the embedding
        model = kind(**(provider_fields(arch) | _routing(origin.spec) | changes))
    else:
        _refuse_scaled_embedding(arch)
        fields = _transformer(arch, hybrid=True) | _hybrid_model(arch) | _routing(origin.spec)
        fields["attention_backend"] = AttnBackend.auto  # as for a GPTModel, because a process uses one backend
        if arch.qk_norm:
            fields["hybrid_stack_spec"] = hybrid_stack_with_qk_norm
        model = HybridModelProvider(**(fields | changes))
    set_origin(model, origin)
    return model


def builder_of(origin: Origin, **changes: Any) -> GPTModelConfig | HybridModelConfig:
    """Return a builder's configuration without hooks that fill the model or refuse a step; see `upcycled_config`."""
    arch = origin.arch
    _refuse_scaled_embedding(arch)
    hybrid = bool(arch.mamba or "hybrid_layer_pattern" in changes)
    model_class = UpcycledHybridConfig if hybrid else UpcycledModelConfig
    outer = {name: value for name, value in changes.items() if name in model_class.__dataclass_fields__}
    inner = _routing(origin.spec) | {name: value for name, value in changes.items() if name not in outer}
    settings = _hybrid_model(arch) if hybrid else _model(arch)
    if hybrid and arch.qk_norm:
        settings["hybrid_stack_spec"] = hybrid_stack_with_qk_norm()
    elif (layers := layers_of(arch)).func is decoder_layers:
        settings["transformer_layer_spec"] = layers
    transformer = TransformerConfig(**(_transformer(arch, hybrid=hybrid) | inner))
    config = model_class(transformer=transformer, **(settings | outer))
    set_origin(config, origin)
    return config


def set_origin(model: Any, origin: Origin) -> None:
    """Keep the origin in the model, as a function: Bridge rewrites all other values when it exports a live model."""
    model.__dict__["_made_of"] = partial(Origin, origin.parent, origin.spec)


def made_of(model: Any) -> Origin | None:
    """Return the origin of a model of this package, or None for any other model."""
    make = vars(model).get("_made_of")
    return make() if make else None


class _SavedWithSizes:
    """A builder's configuration that saves TP and PP at the place in a checkpoint where Bridge 0.6 looks for them.

    A deep copy copies all parts. In Bridge 0.6.2, a deep copy would copy only the `TransformerConfig`. The sequence
    length is stored in both parts, because the warm-up of Bridge 0.6 looks for it in the `TransformerConfig`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "seq_length":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)
        if {"seq_length", "transformer"} <= self.__dict__.keys():
            self.__dict__["transformer"].seq_length = self.__dict__["seq_length"]

    def __deepcopy__(self, memo: dict[int, Any]) -> _SavedWithSizes:
        made = copy.copy(self)
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return made

    def as_dict(self) -> dict[str, Any]:
        """Return the model's entry in a checkpoint's `run_config.yaml`, as if it were of Bridge's own class."""
        bridges: Any = type(self).__bases__[1]
        saved = bridges.as_dict(self) | {"_target_": f"{bridges.__module__}.{bridges.__qualname__}"}
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        return saved | {name: getattr(self.transformer, name) for name in sizes}  # type: ignore[attr-defined]


class UpcycledModelConfig(_SavedWithSizes, GPTModelConfig):
    """Bridge's configuration of a GPTModel."""


class UpcycledHybridConfig(_SavedWithSizes, HybridModelConfig):
    """Bridge's configuration of a HybridModel."""


def provider_fields(arch: Architecture) -> dict[str, Any]:
    """Return the fields of Bridge's provider for a model of an architecture, with or without experts.

    Args:
        arch: architecture of the model.

    Raises:
        SpecError: Bridge's model class cannot represent the model.
    """
    fields = _transformer(arch) | _model(arch)
    layers = layers_of(arch)
    if arch.moe_pattern is not None or layers.func is decoder_layers:  # Bridge's own choice makes all layers alike
        fields["transformer_layer_spec"] = layers
    return fields


def hybrid_stack_with_qk_norm() -> ModuleSpec:
    """Return Megatron's HybridModel layers with query and key norms, which Megatron's own layers lack."""
    spec = copy.deepcopy(hybrid_stack_spec)
    attention = spec.submodules.attention_layer.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = TENorm
    return spec


def _architecture(dense: str | Path | Architecture) -> Architecture:
    return dense if isinstance(dense, Architecture) else read_architecture(Path(dense))


def _refuse_scaled_embedding(arch: Architecture) -> None:
    """Refuse a Gemma model, because some of Bridge's classes do not multiply the embedding."""
    if arch.scaled_embedding:
        raise SpecError(
            f"{arch.hf_class}",
            kind="refused",
            got=(
                "multiplies its embedding by sqrt(hidden_size), which neither a HybridModel nor a builder's model does"
            ),
            fix="make the model with upcycled_provider, without hybrid_layer_pattern",
        )


def _routing(spec: UpcycleSpec | None) -> dict[str, Any]:
    return router_fields(spec) | router_dtype(spec)


def _transformer(arch: Architecture, *, hybrid: bool = False) -> dict[str, Any]:
    """Return the settings of Megatron's `TransformerConfig`."""
    return {
        **megatron_fields(arch, hybrid=hybrid),
        **_KERNELS,
        **(_MOE_KERNELS if arch.num_experts else {}),
        **window_fields(arch),
        # Megatron's own function can be saved by name.
        "activation_func": squared_relu if arch.activation == "squared_relu" else activation_function(arch.activation),
        # If experts weigh their tokens, Megatron's fused activation supports only SwiGLU.
        "bias_activation_fusion": arch.gated and arch.activation == "silu",
    }


def _model(arch: Architecture) -> dict[str, Any]:
    """Return the arguments of Bridge's model besides its `TransformerConfig`."""
    scaling = None if arch.scales_in_layers else arch.rope_scaling
    if scaling and any(scaling.get(name) != value for name, value in _LLAMA3_SCALING.items()):
        raise SpecError(
            "Rope_scaling of the dense checkpoint",
            kind="refused",
            got=f"is {scaling}, and this model supports only Llama 3.1's ({_LLAMA3_SCALING}, with any factor)",
            fix="upcycle the checkpoint in NeMo, where the frequencies can be set",
        )
    return {
        "vocab_size": arch.vocab_size,
        "seq_length": arch.max_positions,
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_percent": arch.rotary_percent,
        "rotary_base": int(arch.rope_theta),
        "rope_scaling": bool(scaling),
        "rope_scaling_factor": float(scaling["factor"]) if scaling else 1.0,
    }


def _hybrid_model(arch: Architecture) -> dict[str, Any]:
    """Return the arguments of Bridge's HybridModel besides its `TransformerConfig`."""
    settings = _model(arch)
    if settings.pop("rope_scaling"):
        raise SpecError(
            "Rope_scaling of the dense checkpoint",
            kind="refused",
            got=f"is {arch.rope_scaling}, and Megatron's HybridModel scales no rotary frequencies",
            fix="omit hybrid_layer_pattern: a GPTModel scales them",
        )
    del settings["rope_scaling_factor"]
    if arch.mamba:
        settings |= {"hybrid_layer_pattern": hybrid_symbols(arch), "position_embedding_type": "none"}
    return settings
