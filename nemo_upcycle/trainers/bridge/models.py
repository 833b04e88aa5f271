"""Bridge's configurations of upcycled and dense models, from a dense checkpoint's architecture and a spec."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.transformer_config import TransformerConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.activation import activation_function
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.megatron_config import megatron_fields, router_fields
from nemo_upcycle.spec import UpcycleSpec


#: The frequencies that Megatron's own scaling has: Llama 3.1's. Its factor alone can be set.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
#: What a GPU wants, with and without experts. The coefficient is that of the package's recipes.
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
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
}


def upcycled_provider(dense: str | Path | Architecture, spec: UpcycleSpec | None, **changes: Any) -> GPTModelProvider:
    """Return Bridge's provider of the model that a spec makes of a dense checkpoint.

    Args:
        dense: the dense checkpoint's folder, or its architecture.
        spec: what is made of it; None for the dense model itself.
        changes: fields of the provider that are to differ: layout, precision, kernels.

    Raises:
        SpecError: Bridge's GPT model cannot be it.

    Example:
        >>> upcycled_provider("/models/Llama-3-8B", UpcycleSpec(), expert_model_parallel_size=8)  # doctest: +SKIP
    """
    arch = _architecture(dense)
    fields = provider_fields(arch.upcycled(spec) if spec else arch)
    return GPTModelProvider(**(fields | _routing(spec) | changes))


def upcycled_config(dense: str | Path | Architecture, spec: UpcycleSpec | None, **changes: Any) -> GPTModelConfig:
    """Return the same as a configuration of Bridge's builders, which are to replace its providers.

    Args:
        dense: the dense checkpoint's folder, or its architecture.
        spec: what is made of it; None for the dense model itself.
        changes: fields of the configuration or of its `TransformerConfig` that are to differ.

    Raises:
        SpecError: Bridge's GPT model cannot be it.
    """
    arch = _architecture(dense)
    arch = arch.upcycled(spec) if spec else arch
    outer = {name: value for name, value in changes.items() if name in GPTModelConfig.__dataclass_fields__}
    inner = _routing(spec) | {name: value for name, value in changes.items() if name not in outer}
    transformer = TransformerConfig(**(_transformer(arch) | inner))
    config = UpcycledModelConfig(transformer=transformer, **(_model(arch) | outer))
    config.transformer.seq_length = config.seq_length  # where the warm-up of Bridge 0.6 looks for it
    return config


class UpcycledModelConfig(GPTModelConfig):
    """Bridge's configuration, saved with TP and PP where Bridge 0.6 looks for them when it loads a checkpoint."""

    def as_dict(self) -> dict[str, Any]:
        """Return what a checkpoint's `run_config.yaml` says of the model, which is there of Bridge's own class."""
        saved = super().as_dict() | {"_target_": f"{GPTModelConfig.__module__}.{GPTModelConfig.__qualname__}"}
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        return saved | {name: getattr(self.transformer, name) for name in sizes}


def provider_fields(arch: Architecture) -> dict[str, Any]:
    """Return the fields of Bridge's provider of a model as its architecture stands, with experts or without.

    Args:
        arch: the architecture.

    Raises:
        SpecError: Bridge's GPT model cannot be it.
    """
    fields = _transformer(arch) | _model(arch)
    if arch.moe_pattern is not None:  # Bridge's own choice makes all layers alike
        fields["transformer_layer_spec"] = partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
    return fields


def _architecture(dense: str | Path | Architecture) -> Architecture:
    arch = dense if isinstance(dense, Architecture) else read_architecture(Path(dense))
    if arch.scaled_embedding:
        raise SpecError(
            "dense",
            got=f"{arch.hf_class}, which multiplies its embedding by sqrt(hidden_size)",
            expected="a parent that Bridge's GPT model can be",
            fix="upcycle it in NeMo",
        )
    return arch


def _routing(spec: UpcycleSpec | None) -> dict[str, Any]:
    if spec is None:
        return {}
    return router_fields(spec) | ({"moe_router_dtype": "fp32"} if spec.needs_float32_routing else {})


def _transformer(arch: Architecture) -> dict[str, Any]:
    """Return the settings of Megatron's `TransformerConfig`."""
    window = {"window_size": (arch.sliding_window - 1, 0)} if arch.sliding_window else {}
    return {
        **megatron_fields(arch),
        **_KERNELS,
        **(_MOE_KERNELS if arch.num_experts else {}),
        **window,
        "activation_func": activation_function(arch.activation),
        # Megatron's fused activation knows SwiGLU alone where experts weigh their tokens.
        "bias_activation_fusion": arch.gated and arch.activation == "silu",
    }


def _model(arch: Architecture) -> dict[str, Any]:
    """Return what Bridge's model takes beside its `TransformerConfig`."""
    scaling = arch.rope_scaling
    if scaling and any(scaling.get(name) != value for name, value in _LLAMA3_SCALING.items()):
        raise SpecError(
            "rope_scaling of the dense checkpoint",
            got=scaling,
            expected=f"Llama 3.1's: {_LLAMA3_SCALING}, with any factor",
            fix="upcycle it in NeMo, whose frequencies can be set",
        )
    return {
        "vocab_size": arch.vocab_size,
        "seq_length": arch.max_positions,
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": int(arch.rope_theta),
        "rope_scaling": bool(scaling),
        "rope_scaling_factor": float(scaling["factor"]) if scaling else 1.0,
    }
