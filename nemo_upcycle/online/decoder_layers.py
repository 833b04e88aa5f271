"""Layers of a GPTModel with norms where Megatron-Core, 0.15 to 0.19, has none.

OLMo 2 has them after attention and network, and over all heads. Its layers are Megatron's own modules, with
Transformer Engine or without; what is new is a norm of each part's output before it is added, and one of query or key
as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.layer_settings import NORMS


def decoder_layers(
    config: Any,
    use_transformer_engine: bool,
    vp_stage: int | None = None,
    *,
    pre_norm: bool = True,
    post_norm: bool = False,
    wide_qk_norm: bool = False,
) -> Any:
    """Return the layers of a rank of a `GPTModel`, as `get_gpt_decoder_block_spec` does, with norms in these places.

    A `transformer_layer_spec` of NeMo's and Megatron-Bridge's configurations, as a partial of all but the first.

    Args:
        config: Megatron's `TransformerConfig`, or one of Bridge's builders, which has it.
        use_transformer_engine: whether its modules compute, or Megatron's local ones.
        vp_stage: number of the virtual pipeline stage.
        pre_norm: whether there are norms before attention and network.
        post_norm: whether there are norms after them, before the residual is added.
        wide_qk_norm: whether norms of query and key, which `qk_layernorm` switches on, are over all heads at once.

    Returns:
        Megatron's `TransformerBlockSubmodules`.

    Example:
        >>> config.transformer_layer_spec = partial(  # doctest: +SKIP
        ...     decoder_layers, use_transformer_engine=True, pre_norm=False, post_norm=True, wide_qk_norm=True
        ... )
    """
    config = getattr(config, "transformer", config)
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    backend: Any = LocalSpecProvider()
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend = TESpecProvider()
    for spec in {id(layer): layer for layer in block.layer_specs}.values():
        layer = spec.submodules
        attention = layer.self_attention.submodules
        if not pre_norm:
            layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
            attention.linear_qkv = backend.column_parallel_linear()
            network = getattr(layer.mlp, "submodules", None) or layer.mlp.keywords["submodules"]
            if hasattr(network, "linear_fc1"):  # experts have theirs without a norm
                network.linear_fc1 = backend.column_parallel_linear()
        if post_norm:
            spec.module = PostNormLayer
            spec.params = {**(spec.params or {}), "norm": backend.layer_norm(rms_norm=True)}
        if wide_qk_norm and config.qk_layernorm:
            attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    return block


def layers_of(arch: Architecture) -> functools.partial[Any]:
    """Return the `transformer_layer_spec` of an architecture, with Transformer Engine; Megatron's own where it can be.

    Args:
        arch: of the model, dense or with experts.
    """
    if arch.norm_places == (True, False) and not arch.wide_qk_norm:
        return functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
    norms = {name: getattr(arch, name) for name in NORMS}
    return functools.partial(decoder_layers, use_transformer_engine=True, **norms)


class PostNormLayer(TransformerLayer):  # type: ignore[misc]
    """A layer that normalises what attention and network return, before it adds it to their input.

    Args:
        norm: the norm's class.
        options: further arguments of Megatron's layer.
    """

    def __init__(self, *args: Any, norm: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        size = self.config.hidden_size
        make = functools.partial(norm, config=self.config, hidden_size=size, eps=self.config.layernorm_epsilon)
        self.post_self_attn_layernorm, self.post_mlp_layernorm = make(), make()
        self.self_attn_bda: Callable[..., Any] = _norm_first(self.self_attn_bda, self.post_self_attn_layernorm)
        self.mlp_bda: Callable[..., Any] = _norm_first(self.mlp_bda, self.post_mlp_layernorm)


def _norm_first(bias_dropout_add: Callable[..., Any], norm: torch.nn.Module) -> Callable[..., Any]:
    """Return Megatron's function that adds a part's output to its input, with the norm of the output before it."""

    def adds(training: bool, fused: bool) -> Callable[..., Any]:
        add = bias_dropout_add(training, fused)

        def norm_and_add(output_with_bias: tuple[torch.Tensor, Any], residual: torch.Tensor, dropout: float) -> Any:
            output, bias = output_with_bias
            return add((norm(output if bias is None else output + bias), None), residual, dropout)

        return norm_and_add

    return adds


class _WideNorm(torch.nn.Module):
    """A norm over all heads at once, with tensor parallelism, too: ranks add up the squares of their heads.

    The weight is whole on every rank, which uses the part of its heads: Megatron adds up the gradients of norms of
    query and key over tensor-parallel ranks.
    """

    #: Megatron's setting of how many heads there are.
    heads = ""

    def __init__(self, hidden_size: int, config: Any, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        width = hidden_size * getattr(config, self.heads)
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))

    def forward(self, heads_SBHK: torch.Tensor) -> torch.Tensor:
        """Return the heads of this rank, normalised by all."""
        wide, width = heads_SBHK.flatten(-2), len(self.weight)
        own = wide.shape[-1]
        first = own * parallel_state.get_tensor_model_parallel_rank() if own < width else 0
        normed: torch.Tensor = _KeepInput.apply(wide, self.weight[first : first + own], width, self.eps)
        return normed.view_as(heads_SBHK)


class _KeepInput(torch.autograd.Function):
    """The norm of rows of which a rank has a part. It keeps them, and one number for each, as fused norms do."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, width: int, eps: float) -> torch.Tensor:
        """Return rows over the root of the mean of all squares, times the weight."""
        wide, factors = _computed(rows, weight)
        roots = torch.rsqrt(_over_ranks(wide.square(), width) / width + eps)
        ctx.save_for_backward(rows, weight, roots)
        ctx.width = width
        return (wide * roots * factors).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Return the gradients of rows and weight."""
        rows, weight, roots = ctx.saved_tensors
        wide, factors = _computed(rows, weight)
        gradient = gradients[0].to(wide.dtype)
        normed, scaled = wide * roots, gradient * factors
        mean = _over_ranks(scaled * normed, ctx.width) / ctx.width
        of_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return (roots * (scaled - normed * mean)).to(rows.dtype), of_weight, None, None


def _computed(rows: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both in the type to compute in, float32 or more."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype), weight.to(dtype)


def _over_ranks(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """Return the sums of rows, of which a rank may have a part."""
    sums = numbers.sum(-1, keepdim=True)
    if numbers.shape[-1] < width:
        torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    return sums


class QueryNorm(_WideNorm):
    """The norm of the query."""

    heads = "num_attention_heads"


class KeyNorm(_WideNorm):
    """The norm of the key."""

    heads = "num_query_groups"
