"""GPTModel layers with norms, factors and rotary embeddings that Megatron-Core 0.15 to 0.19 does not offer.

OLMo 2 has norms after attention and network, and norms over all heads at once. Granite has factors after attention and
network, and on its embedding and logits. OLMo 3 and Gemma 3 have different rotary embeddings in different layers. Most
layers of Qwen3.5 have a gated delta net (`delta_layers`).

The layers are Megatron's own modules, with or without Transformer Engine. Four things are new: a norm or factor on the
output of attention or network before the residual is added, a norm over the whole query or key, factors on embedding
and logits, and rotary angles that a layer computes from the model's angles.
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
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.architecture_parts import Rope
from nemo_upcycle.models.delta_nets import has_nets
from nemo_upcycle.models.layer_settings import DECODER, decoder_settings, layers_with
from nemo_upcycle.models.rotary import attention_factor, layer_frequencies, plain_frequencies
from nemo_upcycle.online.delta_layers import with_nets, without_nets


def decoder_layers(  # noqa: PLR0913 - started runs name its arguments
    config: Any,
    use_transformer_engine: bool,
    vp_stage: int | None = None,
    *,
    pre_norm: bool = True,
    post_norm: bool = False,
    wide_qk_norm: bool = False,
    embedding_multiplier: float = 1.0,
    residual_multiplier: float = 1.0,
    logits_scaling: float = 1.0,
    rope_theta: float | None = None,
    rope_scaling: dict[str, Any] | None = None,
    local_rope_theta: float | None = None,
    max_positions: int = 4096,
    rotary_percent: float = 1.0,
    shared_gate: bool = False,
) -> Any:
    """Return the layers of a `GPTModel` on one rank, with norms, factors and rotary embeddings in the given places.

    The result is like the result of `get_gpt_decoder_block_spec`. In a NeMo or Megatron-Bridge configuration, set
    `transformer_layer_spec` to a `functools.partial` of this function with every argument except `config`.

    Args:
        config: Megatron's `TransformerConfig`, or a Bridge builder that contains one.
        use_transformer_engine: True for modules of Transformer Engine, False for Megatron's local modules.
        vp_stage: number of the virtual pipeline stage.
        pre_norm: whether there are norms before attention and network.
        post_norm: whether there are norms after attention and network, before the residual is added.
        wide_qk_norm: whether the norms of query and key are over all heads at once; `qk_layernorm` switches them on.
        embedding_multiplier: factor on the embedding, applied by the first layer.
        residual_multiplier: factor on the outputs of attention and network before the residual is added.
        logits_scaling: divisor of the logits, applied to the last norm's output.
        rope_theta: base of the model's rotary embedding; None if the layers do not change the rotary embedding.
        rope_scaling: scaling of the rotary frequencies in layers without a window, and in layers with a window if
            `local_rope_theta` is None.
        local_rope_theta: base of the rotary embedding in layers with a window. The frequencies of these layers are not
            scaled.
        max_positions: longest sequence, see `Architecture`.
        rotary_percent: rotated share of a head, see `Architecture`.
        shared_gate: whether the shared experts have a gate, which Megatron's own modules compute.

    Returns:
        Megatron's `TransformerBlockSubmodules`.

    Raises:
        SpecError: YaRN's attention factor is combined with heads that are only partly rotated.

    Example:
        >>> config.transformer_layer_spec = partial(  # doctest: +SKIP
        ...     decoder_layers, use_transformer_engine=True, pre_norm=False, post_norm=True, wide_qk_norm=True
        ... )
    """
    config = getattr(config, "transformer", config)
    block = get_gpt_decoder_block_spec(
        without_nets(config), use_transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    backend: Any = LocalSpecProvider()
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend = TESpecProvider()
    rope = None
    if rope_theta is not None:
        rope = Rope(
            head_dim=config.kv_channels,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            local_rope_theta=local_rope_theta,
            rotary_percent=rotary_percent,
            max_positions=max_positions,
        )
        # `_scaled` multiplies whole scores, but YaRN's factor belongs to the rotated part of a head only.
        if rotary_percent != 1 and attention_factor(rope) != 1:
            raise SpecError(
                field="rotary_percent",
                got=rotary_percent,
                expected="1, because the checkpoint uses YaRN's attention factor",
                fix="use a checkpoint that rotates whole heads (rotary_percent=1)",
            )
    for spec in {id(layer): layer for layer in block.layer_specs}.values():
        layer = spec.submodules
        attention = layer.self_attention.submodules
        network = getattr(layer.mlp, "submodules", None) or layer.mlp.keywords["submodules"]
        if shared_gate and getattr(network, "shared_experts", None):
            network.shared_experts = _with_gate(network.shared_experts)
        if not pre_norm:
            layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
            attention.linear_qkv = backend.column_parallel_linear()
            if hasattr(network, "linear_fc1"):  # experts' first matrices never contain the norm
                network.linear_fc1 = backend.column_parallel_linear()
        if rope:
            attention.core_attention = _scaled(attention.core_attention, rope)
        if post_norm or rope or (embedding_multiplier, residual_multiplier) != (1.0, 1.0):
            spec.module = DecoderLayer
            spec.params = {
                **(spec.params or {}),
                "norm": backend.layer_norm(rms_norm=True) if post_norm else None,
                "embedding_multiplier": embedding_multiplier,
                "residual_multiplier": residual_multiplier,
                "rope": rope,
            }
        if wide_qk_norm and config.qk_layernorm:
            attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    if has_nets(config):
        block.layer_specs = with_nets(config, block.layer_specs, vp_stage, backend)
    if logits_scaling != 1.0:
        block.layer_norm = _divided(block.layer_norm, logits_scaling)
    return block


def layers_of(arch: Architecture) -> functools.partial[Any]:
    """Return the `transformer_layer_spec` of an architecture, with Transformer Engine.

    Megatron's own function is used if it can build the layers.

    Args:
        arch: architecture of the model, dense or with experts.
    """
    fields = decoder_settings(arch)
    if not arch.delta and fields == {name: Architecture.__dataclass_fields__[name].default for name in DECODER}:
        return functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
    return functools.partial(decoder_layers, use_transformer_engine=True, **fields)


def _with_gate(shared_experts: Any) -> Any:
    """Give shared experts a gate: through their `ModuleSpec` in Megatron-Core 0.15, through their builder in 0.19."""
    if isinstance(shared_experts, ModuleSpec):
        shared_experts.params = {**(shared_experts.params or {}), "gate": True}
        return shared_experts
    return lambda **options: shared_experts(**(options | {"gate": True}))


def _is_windowed(config: Any, layer_number: int) -> bool:
    """Return whether a layer, counted from 1, has a window."""
    return bool(config.window_size and layers_with(config.window_attn_skip_freq, config.num_layers)[layer_number - 1])


def _scaled(core_attention: Any, rope: Rope) -> type:
    """Return an attention class that multiplies the scores by the square of `attention_factor`."""

    class Scaled:
        def __new__(cls, config: Any, layer_number: int, *args: Any, softmax_scale: Any = None, **options: Any) -> Any:
            has_own = _is_windowed(config, layer_number) and rope.local_rope_theta is not None
            factor = 1.0 if has_own else attention_factor(rope)
            if factor != 1.0:
                softmax_scale = (softmax_scale or config.kv_channels**-0.5) * factor**2
            return core_attention(config, layer_number, *args, softmax_scale=softmax_scale, **options)

    return Scaled


class DecoderLayer(TransformerLayer):  # type: ignore[misc]
    """A layer that normalises or multiplies the outputs of attention and network before it adds them to the residual.

    Args:
        norm: class of the norm; None for no norm.
        embedding_multiplier: factor on the input of the model's first layer.
        residual_multiplier: factor on the outputs before they are added.
        rope: rotary embedding from which the layer computes its own angles; None to use the model's angles.
        options: further arguments for Megatron's layer.
    """

    def __init__(
        self,
        *args: Any,
        norm: Any = None,
        embedding_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        rope: Rope | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        # The frequencies are not a buffer, because a cast of the model to 16 bits would round buffers, too.
        self.rotary_frequencies: torch.Tensor | None = None
        self._ratio: torch.Tensor | None = None
        if rope:
            with torch.device("cpu"):  # the model may be built on the meta device first
                self.rotary_frequencies = layer_frequencies(rope, _is_windowed(self.config, self.layer_number))
                self._ratio = (self.rotary_frequencies / plain_frequencies(rope)).repeat(2)
        self.embedding_multiplier, self.residual_multiplier = embedding_multiplier, residual_multiplier
        after: list[Any] = [None, None]
        if norm:
            size, eps = self.config.hidden_size, self.config.layernorm_epsilon
            after = [norm(config=self.config, hidden_size=size, eps=eps) for _ in range(2)]
            self.post_self_attn_layernorm, self.post_mlp_layernorm = after
        self.self_attn_bda: Callable[..., Any] = _changed_first(self.self_attn_bda, after[0], residual_multiplier)
        self.mlp_bda: Callable[..., Any] = _changed_first(self.mlp_bda, after[1], residual_multiplier)

    def _forward_attention(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        if self.layer_number == 1 and self.embedding_multiplier != 1.0:
            hidden_states = hidden_states * self.embedding_multiplier
        if self._ratio is not None and (angles := options.get("rotary_pos_emb")) is not None:
            options["rotary_pos_emb"] = (
                tuple(map(self._turned, angles)) if isinstance(angles, tuple) else self._turned(angles)
            )
        return super()._forward_attention(hidden_states, *args, **options)

    def _turned(self, angles: torch.Tensor) -> torch.Tensor:
        """Compute this layer's angles from the model's angles."""
        assert self._ratio is not None
        ratio = self._ratio.to(angles.device)
        self._ratio = self._ratio if ratio.is_meta else ratio
        return angles * ratio


def _changed_first(bias_dropout_add: Callable[..., Any], norm: Any, factor: float) -> Callable[..., Any]:
    """Wrap Megatron's bias-dropout-add so that it applies norm and factor to an output before it adds the residual."""

    def adds(training: bool, fused: bool) -> Callable[..., Any]:
        add = bias_dropout_add(training, fused)

        def change_and_add(output_with_bias: tuple[torch.Tensor, Any], residual: torch.Tensor, dropout: float) -> Any:
            output, bias = output_with_bias
            output = output if bias is None else output + bias
            output = norm(output) if norm else output
            return add((output if factor == 1.0 else output * factor, None), residual, dropout)

        return change_and_add

    return adds


def _divided(norm: Any, divisor: float) -> type:
    """Return a norm class whose output is divided, so that an output layer without a bias returns divided logits."""

    class Divided:
        def __new__(cls, *args: Any, **options: Any) -> Any:
            made = norm(*args, **options)
            made.logits_scaling = divisor
            made.register_forward_hook(lambda _module, _inputs, output: output / divisor)
            return made

    return Divided


class _WideNorm(torch.nn.Module):
    """A norm over all heads at once. Under tensor parallelism, ranks add up the squares of their heads.

    Every rank holds the whole weight and uses the part for its own heads, because Megatron adds up the gradients of
    query and key norms over the tensor-parallel ranks.
    """

    #: Megatron's setting for the number of heads.
    heads = ""

    def __init__(self, hidden_size: int, config: Any, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        width = hidden_size * getattr(config, self.heads)
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))

    def forward(self, heads_SBHK: torch.Tensor) -> torch.Tensor:
        """Return this rank's heads, normalised over the heads of all ranks."""
        wide, width = heads_SBHK.flatten(-2), len(self.weight)
        own = wide.shape[-1]
        first = own * parallel_state.get_tensor_model_parallel_rank() if own < width else 0
        normed: torch.Tensor = _KeepInput.apply(wide, self.weight[first : first + own], width, self.eps)
        return normed.view_as(heads_SBHK)


class _KeepInput(torch.autograd.Function):
    """The norm of rows that may be split over ranks.

    For the backward pass, this function keeps the rows and one number per row, as fused norms do.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, width: int, eps: float) -> torch.Tensor:
        """Divide each row by its root mean square over all ranks, and multiply it by the weight."""
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
    """Cast rows and weight to the type for computing: float32 or wider."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype), weight.to(dtype)


def _over_ranks(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """Return the sum of each row, over all ranks if a rank has only a part of the row."""
    sums = numbers.sum(-1, keepdim=True)
    if numbers.shape[-1] < width:
        torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    return sums


class QueryNorm(_WideNorm):
    """The norm over all query heads."""

    heads = "num_attention_heads"


class KeyNorm(_WideNorm):
    """The norm over all key heads."""

    heads = "num_query_groups"
