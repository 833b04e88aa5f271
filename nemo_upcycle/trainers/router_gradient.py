"""A gradient of the router from every expert, while a layer's output stays that of the chosen ones (DenseMixer).

An MoE layer gives the sum of p_e y_e over the chosen experts: p_e their weights, y_e their outputs. Top-k has no
gradient, so a router learns from the experts that it has chosen, and never what another one would have given. The
straight-through estimator differentiates as if nothing had been left out: dL/dw_e = <dL/dy, y_e> for every expert,
with y the layer's output and w the weights of a router that chooses all, scaled to equal p where an expert was chosen;
the scale of each token is held constant. (For softmax w_e is its probability, over the sum of the chosen ones' where
they are made to sum to one.)

Experts learn from their own tokens alone, as before, and the layer's value has the same bits. Forward, nothing more is
computed. Backward, Megatron gives the products with the outputs of the chosen experts (they are the gradient of p);
for all others the layer's own dispatcher sends every token once more, to the experts that were not chosen, which
compute without gradients. Every rank does so at the same place of its backward pass, as in recomputation, so that any
layout gives the same gradient. Tokens go in parts that are about as large as the layer's own forward pass.

Source: Yao et al., DenseMixer (https://fengyao.notion.site/moe-posttraining); asked for in NVIDIA/Megatron-LM #4169.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.schedules import graphs_attention_alone
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.ranks import is_first_rank


DENSE_GRADIENT = "dense_router_gradient"


def check_router_gradient(config: Any, model: str = "", settings: str = "") -> None:
    """Check that the layers of a model can give their routers a gradient of all experts.

    Args:
        config: a `TransformerConfig`, or NeMo-Run's configuration of one.
        model: prefix of its settings, for the text of errors.
        settings: prefix of `dense_router_gradient`.

    Raises:
        SpecError: they cannot.

    Example:
        >>> check_router_gradient(recipe.model.config, "model.config.", "optim.")  # doctest: +SKIP
    """
    for name, is_wrong, expected in _rules(config):
        if is_wrong:
            got = getattr(config, name, None)
            fix = f"set it so, or {settings}{DENSE_GRADIENT}=False"
            raise SpecError(field=f"{model}{name}", got=got, expected=expected, fix=fix)


def _rules(config: Any) -> Iterator[tuple[str, bool, str]]:
    """Yield settings, whether each is wrong, and what is right."""

    def value(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    experts, chosen = value("num_moe_experts") or 0, value("moe_router_topk", 2)
    yield "num_moe_experts", not experts, "experts, whose router it is the gradient of"
    yield "moe_router_topk", chosen >= experts, f"fewer than the experts ({experts}): else none is left out"
    dispatcher, text = value("moe_token_dispatcher_type", "allgather"), "others hand back the sum of a token's experts"
    yield "moe_token_dispatcher_type", dispatcher != "alltoall", f"alltoall: {text}"
    overlap = "overlap_moe_expert_parallel_comm"
    yield overlap, bool(value(overlap)), "False: its schedule cuts a layer into parts whose gradients do not meet"
    for name in ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"):
        parts = value("cuda_graph_modules") or value("cuda_graph_scope")
        graphs = value(name) not in (None, False, "none") and not graphs_attention_alone(parts)
        yield name, graphs, "no CUDA graph of the experts: their tokens are counted anew each time"
    score = value("moe_router_score_function", "softmax")
    text = "softmax with top-1: another single score is no share of all experts"
    yield "moe_router_score_function", score != "softmax" and chosen == 1, text
    balancing = "moe_router_load_balancing_type"
    yield balancing, value(balancing) == "sinkhorn", "a loss or a bias: sinkhorn's weights are not those of the scores"
    text = "None with quantiles: what they chose of the tokens that are dropped is not known"
    dropping = value("moe_expert_capacity_factor") is not None and value(balancing) == "quantile_balancing"
    yield "moe_expert_capacity_factor", dropping, text
    text = "False: an expert's output is then no multiple of its weight"
    yield "moe_apply_probs_on_input", bool(value("moe_apply_probs_on_input")), text
    yield "moe_latent_size", bool(value("moe_latent_size")), "None: experts of narrowed tokens are not tried"
    text = "False: experts compute once more outside of FP8, where kernels take no parameters in FP8"
    yield "fp8_param", bool(value("fp8_param")), text


def let_all_experts_teach(chunks: Iterable[torch.nn.Module], config: Any) -> int:
    """Give the routers of this rank the gradient of all experts, from now on; on every rank, before the first step.

    Args:
        chunks: chunks of the model on this rank, wrapped or not; changed in place.
        config: configuration of their transformer.

    Returns:
        The number of changed layers: 0 on a rank that has no experts.

    Raises:
        SpecError: the layers cannot compute this gradient.

    Example:
        >>> let_all_experts_teach(model_chunks, config)  # doctest: +SKIP
        32
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    check_router_gradient(config)
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    for layer in layers:
        _AllExperts(layer)
    if is_first_rank():
        more = config.num_moe_experts - config.moe_router_topk
        text = "router gradient: of all experts; backward, each token goes to the other %d as well"
        show_messages().info(text, more)
    return len(layers)


class _AllExperts:
    """Lets the router of a layer learn from all experts.

    T are the tokens of this rank, E experts, D the width, S slots: a token and one of the experts that it is sent to.

    Args:
        layer: Megatron's `MoELayer`; its router and its last step are wrapped.
    """

    def __init__(self, layer: Any) -> None:
        self._layer, self._config = layer, layer.config
        last = "postprocess" if hasattr(layer, "postprocess") else "combine"  # the latter in Megatron-Core 0.15
        self._routing, self._last = layer.router.routing, getattr(layer, last)
        self._hidden: torch.Tensor | None = None
        self._routed: tuple[torch.Tensor, torch.Tensor] | None = None
        layer.router.register_forward_pre_hook(self._keep)
        layer.router.routing = self._route
        setattr(layer, last, self._combined)

    def _keep(self, router: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._hidden = inputs[0]

    def _route(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Route as the router does, with a gradient to the weights of all experts."""
        probs_TE, chosen_TE = self._routing(logits, *args, **kwargs)
        if not self._layer.training or not torch.is_grad_enabled():
            return probs_TE, chosen_TE
        weights_TE = _weights_of_all(self._layer.router, logits.reshape(-1, logits.shape[-1]), chosen_TE)
        self._routed = weights_TE, chosen_TE
        return _Chosen.apply(probs_TE, weights_TE, chosen_TE), chosen_TE

    def _combined(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output, through which the others' part of that gradient comes."""
        output = self._last(*args, **kwargs)
        routed, hidden, self._routed, self._hidden = self._routed, self._hidden, None, None
        if routed is None or hidden is None:
            return output
        through: torch.Tensor = _Others.apply(output, routed[0], hidden.detach(), routed[1], self)
        return through

    @torch.no_grad()
    def products(self, hidden: torch.Tensor, grad: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
        """Compute a gradient's products with the outputs of experts that were not chosen, [T, E]; 0 for chosen ones.

        Args:
            hidden: the layer's input, [..., D].
            grad: gradient of the layer's output, [..., D].
            chosen_TE: whether a token was sent to an expert.
        """
        chosen = self._config.moe_router_topk
        parts = math.ceil((self._config.num_moe_experts - chosen) / chosen)
        tensors = (hidden.flatten(0, -2), grad.flatten(0, -2), ~chosen_TE)
        pieces = zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True)
        return torch.cat([self._products(*piece) for piece in pieces])

    def _products(self, hidden_TD: torch.Tensor, grad_TD: torch.Tensor, asked_TE: torch.Tensor) -> torch.Tensor:
        outputs_SD, asked_ET = self._outputs(hidden_TD, asked_TE), asked_TE.T.contiguous()
        tokens_S = torch.arange(len(hidden_TD), device=asked_ET.device).expand_as(asked_ET)[asked_ET]
        wide = torch.promote_types(outputs_SD.dtype, torch.float32)
        products_S = (outputs_SD.to(wide) * grad_TD[tokens_S]).sum(-1)
        return torch.zeros_like(asked_ET, dtype=wide).masked_scatter_(asked_ET, products_S).T

    def _outputs(self, hidden_TD: torch.Tensor, asked_TE: torch.Tensor) -> torch.Tensor:
        """Return the outputs of experts for the tokens that are sent to them, [S, D], expert by expert."""
        layer, config, dispatcher = self._layer, copy.copy(self._config), copy.copy(self._layer.token_dispatcher)
        config.moe_router_topk = config.num_moe_experts - config.moe_router_topk
        for name in ("moe_permute_fusion", "moe_router_padding_for_fp8", "moe_router_padding_for_quantization"):
            setattr(config, name, False)
        dispatcher.config, dispatcher.drop_and_pad, dispatcher.shared_experts = config, False, None
        ones_TE = asked_TE.to(torch.promote_types(hidden_TD.dtype, torch.float32))  # what tensor parallelism sums in
        sent, weights = dispatcher.dispatch_preprocess(hidden_TD, asked_TE, ones_TE)
        sent, weights = dispatcher.token_dispatch(sent, weights)
        sent, tokens_per_expert, weights = dispatcher.dispatch_postprocess(sent, weights)
        outputs, _ = layer.experts(sent, tokens_per_expert, weights)
        made: torch.Tensor = dispatcher.token_combine(dispatcher.combine_preprocess(outputs))
        return made


def _weights_of_all(router: Any, logits_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
    """Return the weights of a router that chooses all experts, scaled to equal the chosen ones' where it chooses."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    config = router.config
    route = functools.partial(
        topk_routing_with_score_function,
        use_pre_softmax=config.moe_router_pre_softmax,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=config.moe_router_score_function,
    )
    weights_TE, _ = route(logits_TE, config.num_moe_experts)
    if config.moe_router_pre_softmax and config.moe_router_score_function == "softmax":
        return weights_TE  # the chosen ones are not made to sum to one
    with torch.no_grad():
        if config.moe_expert_capacity_factor is not None:  # before tokens were dropped
            _, chosen_TE = route(logits_TE, config.moe_router_topk, expert_bias=router.expert_bias)
        scale_T1 = weights_TE.sum(-1, keepdim=True) / (weights_TE * chosen_TE).sum(-1, keepdim=True)
    return weights_TE * scale_T1


class _Chosen(torch.autograd.Function):
    """The weights of the chosen experts, whose gradient goes to those of all; auxiliary losses behind them stay."""

    @staticmethod
    def forward(ctx: Any, probs_TE: torch.Tensor, weights_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
        """Return the first."""
        ctx.save_for_backward(chosen_TE)
        return probs_TE

    @staticmethod
    def backward(ctx: Any, grad_TE: torch.Tensor) -> Any:
        """Give the gradient of the chosen experts to the second."""
        (chosen_TE,) = ctx.saved_tensors
        return torch.zeros_like(grad_TE), grad_TE * chosen_TE, None


class _Others(torch.autograd.Function):
    """A layer's output, whose gradient goes to the weights of the experts that were not chosen as well."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        weights_TE: torch.Tensor,
        hidden: torch.Tensor,
        chosen_TE: torch.Tensor,
        experts: _AllExperts,
    ) -> torch.Tensor:
        """Return the first."""
        ctx.save_for_backward(hidden, chosen_TE)
        ctx.experts, ctx.dtype = experts, weights_TE.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Give the gradient to the first as it is, and to the second its products with the others' outputs."""
        hidden, chosen_TE = ctx.saved_tensors
        return grad, ctx.experts.products(hidden, grad, chosen_TE).to(ctx.dtype), None, None, None
