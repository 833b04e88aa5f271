"""The settings of a model configuration that need CUDA or Transformer Engine, and their values on a CPU."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch


# Fields of Megatron's and NeMo's configurations whose usual value needs CUDA, Apex or Transformer Engine.
CPU_FIELDS: dict[str, Any] = {
    "apply_rope_fusion": False,
    "batch_p2p_comm": False,  # True would swap the two messages between two interleaved stages
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "fp8_param": False,
    "fp4_param": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "moe_grouped_gemm": False,  # SequentialMLP has the same parameters, with the same names in a checkpoint
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "persist_layer_norm": False,
    "tp_comm_overlap": False,
    "use_transformer_engine_full_layer_spec": False,
    # A pipeline stage's output must outlive the send that reads it: gloo sends from its own thread, and no stream
    # keeps the memory until the send has finished.
    "deallocate_pipeline_outputs": False,
}


def configure_for_cpu(config: Any) -> None:
    """Switch off, in place, the settings of a model configuration that need CUDA or Transformer Engine.

    The CPU backend calls this function for every new configuration; the checkpoint's `context` does not show the
    change. Call this function for an object that was made before the backend was installed. If the object is a
    `run.Config`, the changes are visible in the recipe and are recorded with the recipe.

    Args:
        config: a `TransformerConfig`, a NeMo `GPTConfig`, or a `run.Config` of one of them; missing fields are
            skipped.

    Example:
        >>> configure_for_cpu(recipe.model.config)  # doctest: +SKIP
    """
    target = getattr(config, "__fn_or_cls__", type(config))
    names = target.__dataclass_fields__
    for name, value in CPU_FIELDS.items():
        if name in names:
            setattr(config, name, value)
    is_silu = getattr(config, "activation_func", None) is torch.nn.functional.silu
    if "bias_activation_fusion" in names and not (is_silu and getattr(config, "gated_linear_unit", False)):
        config.bias_activation_fusion = False  # with experts, Megatron fuses only SwiGLU
    if "transformer" in names:  # a builder's configuration
        configure_for_cpu(config.transformer)
    if "transformer_layer_spec" in names:
        config.transformer_layer_spec = _local_layer_spec(config.transformer_layer_spec)
    if "hybrid_stack_spec" in names:
        stack = local_hybrid_stack_with_qk_norm if config.qk_layernorm else local_hybrid_stack
        config.hybrid_stack_spec = stack() if "transformer" in names else stack  # a provider calls the function


#: Modules of NeMo and Megatron-Bridge that define layer specs. Both modules use the same names.
_LAYER_SPECS = ("nemo.collections.llm.gpt.model.base", "megatron.bridge.models.gpt_provider")
_WITH_TRANSFORMER_ENGINE = (
    "default_layer_spec",
    "transformer_engine_layer_spec",
    "transformer_engine_full_layer_spec",
)


def _local_layer_spec(spec: Any) -> Any:
    """Return the local spec for a Transformer Engine spec of NeMo, Bridge or Megatron, and other specs unchanged."""
    if spec is None:  # the default of a builder's configuration
        return _local_layers
    module = getattr(spec, "__module__", None)
    if module in _LAYER_SPECS and spec.__name__ in _WITH_TRANSFORMER_ENGINE:
        return sys.modules[module].local_layer_spec
    if isinstance(spec, functools.partial) and "use_transformer_engine" in spec.keywords:
        return functools.partial(spec, use_transformer_engine=False)  # the spec of models with dense and MoE layers
    return spec


def _local_layers(config: Any, vp_stage: int | None = None) -> Any:
    """Return the layers of a builder's GPTModel without Transformer Engine."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config.transformer, use_transformer_engine=False, vp_stage=vp_stage)


def local_hybrid_stack() -> Any:
    """Return the layers of Megatron's HybridModel without Transformer Engine."""
    from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    spec = get_hybrid_stack_modelopt_spec(local_core_attention=True, remap_te_layernorm=True)
    spec.submodules.attention_layer.submodules.input_layernorm = WrappedTorchNorm
    spec.submodules.mamba_layer.submodules.norm = WrappedTorchNorm
    for layer in (spec.submodules.mlp_layer, spec.submodules.moe_layer):
        layer.submodules.pre_mlp_layernorm = WrappedTorchNorm
    return spec


def local_hybrid_stack_with_qk_norm() -> Any:
    """Return the layers of `local_hybrid_stack`, with query and key norms."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    spec = local_hybrid_stack()
    attention = spec.submodules.attention_layer.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = WrappedTorchNorm
    return spec
