"""Make auxiliary losses of the router act with the coefficient that is set, in every layout, and describe them.

A rank of a tensor- and context-parallel group computes its tokens' part of such a loss. Megatron sums gradients over
tensor-parallel ranks and averages them over data- and context-parallel ones, so the context-parallel size belongs in
the loss scale. In megatron-core 0.15 it is missing; with `calculate_per_token_loss` the tensor-parallel size is, too.
Data-parallel ranks have a part of `global_aux_loss` each, too, and the data-parallel size is missing in every release
up to 0.19. The missing factor is measured, not looked up by version: containers hold releases with fixes of their own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.package_info import __version__ as megatron_version
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter

from nemo_upcycle.models.balancing import balancing_bias
from nemo_upcycle.online.receipt import ActingCoefficient
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.progress import show_messages


GLOBAL = "global_aux_loss"
#: Settings of the router that is measured: plain top-1, nothing dropped, no random number drawn, no loss scale.
_PROBE: dict[str, Any] = {
    "moe_router_topk": 1,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_fusion": False,
    "moe_enable_routing_replay": False,
    "moe_expert_capacity_factor": None,
    "perform_initialization": False,
    "grad_scale_func": None,
    "moe_grad_scale_func": None,
    "mtp_num_layers": None,
    "timers": None,
}


def correct_losses(config: Any) -> list[ActingCoefficient]:
    """Multiply what Megatron makes of auxiliary losses by what it lacks on this layout, in this process.

    The scale is where Megatron 0.16 has it, too: it serves every auxiliary loss and schedule, coefficients that change
    during the training, and FP16's loss scale. Where nothing is missing, Megatron stays as it is. What the global
    loss lacks on top is multiplied into its coefficient, when a router asks for it.

    Args:
        config: the model's. Megatron's groups must be there, and every rank must call this.

    Returns:
        What is set and what acts, for each auxiliary loss of the model; the first rank logs what differs.
    """
    _multiply_scale(1.0)
    _multiply_global(1.0)
    if not config.num_moe_experts:
        return []
    undone = round(1 / _acting_share(config, "aux_loss"), 4)
    _multiply_scale(undone)
    coefficients = _coefficients(config)
    undone_global = round(1 / _acting_share(config, GLOBAL), 4) if GLOBAL in coefficients else 1.0
    _multiply_global(undone_global)
    losses = [
        _describe(config, name, value, undone * (undone_global if name == GLOBAL else 1.0))
        for name, value in coefficients.items()
    ]
    if torch.distributed.get_rank() == 0:
        _report(losses)
    return losses


def _report(losses: list[ActingCoefficient]) -> None:
    """Report the auxiliary losses that do not act as they are set, and those that this package corrects."""
    for loss in losses:
        if loss.acting != loss.coefficient:
            text = "%s: a coefficient of %g acts as %g (%s); a coefficient %.4g times as large compensates"
            show_messages().warning(
                text, loss.name, loss.coefficient, loss.acting, loss.why, loss.coefficient / loss.acting
            )
        elif loss.why != "as set":
            show_messages().info("%s: a coefficient of %g acts as set (%s)", loss.name, loss.coefficient, loss.why)


def _multiply_scale(factor: float) -> None:
    """Let Megatron's schedules set `factor` times their scale of auxiliary losses; 1 puts their own function back."""
    original = getattr(MoEAuxLossAutoScaler.set_loss_scale, "__wrapped__", MoEAuxLossAutoScaler.set_loss_scale)

    @functools.wraps(original)
    def set_loss_scale(scale: torch.Tensor) -> None:
        original(scale * factor)

    MoEAuxLossAutoScaler.set_loss_scale = staticmethod(original if factor == 1 else set_loss_scale)


def _multiply_global(factor: float) -> None:
    """Let routers balance the global batch with `factor` times its coefficient; 1 puts their own method back.

    The loss that Megatron logs is divided by the same number, so it stays as it is.
    """
    original = getattr(TopKRouter.get_aux_loss_coeff, "__wrapped__", TopKRouter.get_aux_loss_coeff)

    @functools.wraps(original)
    def get_aux_loss_coeff(router: TopKRouter, aux_loss_type: str) -> float:
        coefficient: float = original(router, aux_loss_type)
        return coefficient * factor if aux_loss_type == GLOBAL else coefficient

    TopKRouter.get_aux_loss_coeff = original if factor == 1 else get_aux_loss_coeff


def _coefficients(config: Any) -> dict[str, float]:
    """Read the coefficients that are not zero, by the names of the losses."""
    return {name: value for name, value in {**_balancing(config), "z_loss": config.moe_z_loss_coeff}.items() if value}


def _balancing(config: Any) -> dict[str, float]:
    kinds, values = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    balancing = dict(zip(kinds, values, strict=True)) if isinstance(kinds, list) else {kinds: values}
    return {kind: value for kind, value in balancing.items() if kind.endswith("aux_loss")}


def _describe(config: Any, name: str, coefficient: float, undone: float) -> ActingCoefficient:
    share, reasons = float(f"{_acting_share(config, name):.5g}"), []
    if undone != 1:
        reasons.append(f"megatron-core {megatron_version} divides it by {undone:g} on this layout, which is undone")
    if share != 1:
        reasons.append(f"megatron-core {megatron_version} multiplies it by {share:g} on this layout")
    return ActingCoefficient(name, coefficient, coefficient * share, "; ".join(reasons) or "as set")


def _acting_share(config: Any, name: str) -> float:
    """Return the gradient that a loss of coefficient 1 gives a router, over the one that it should give.

    Every rank routes the same token, so that the loss of all of them is that of one alone: E * p_0 for balancing (all
    tokens go to expert 0, with probability p_0), the squared logsumexp of the logits for the z-loss.
    """
    is_z_loss = name == "z_loss"
    probe = copy.copy(config)
    coefficients = {"moe_aux_loss_coeff": float(not is_z_loss), "moe_z_loss_coeff": 1.0 if is_z_loss else None}
    balancing = {"moe_router_load_balancing_type": "none" if is_z_loss else name}
    for field, value in {**_PROBE, **coefficients, **balancing}.items():
        setattr(probe, field, value)
    logits = torch.zeros(1, 1, config.num_moe_experts, device=torch.cuda.current_device())
    logits[..., 0] = 1.0
    logits.requires_grad_()
    alone = logits.logsumexp(-1).square() if is_z_loss else config.num_moe_experts * logits.softmax(-1)[..., 0]
    expected = torch.autograd.grad(alone.sum(), logits)[0]
    got = gradient_of_losses(TopKRouter(probe, get_default_pg_collection()).train(), logits)
    if not config.calculate_per_token_loss:  # by the sum over tensor-parallel ranks; else tokens are counted instead
        got = got * parallel_state.get_tensor_model_parallel_world_size()
    return float((got * expected).sum() / expected.square().sum())


def gradient_of_losses(router: TopKRouter, logits: torch.Tensor) -> torch.Tensor:
    """Compute the part of the gradient of a router's logits that its auxiliary losses add on this rank.

    Args:
        router: a router in training mode.
        logits: logits, [S, B, E], a leaf that requires a gradient.
    """
    with temporarily_set(MoEAuxLossAutoScaler, "main_loss_backward_scale", None):
        scores, _ = router.routing(logits)
        # What a schedule does after every forward step: here of a stage without a loss of its own.
        context = parallel_state.get_context_parallel_world_size()
        forward_step_calc_loss(None, scores, None, router.config, None, False, 1, [], context, False)
        return torch.autograd.grad(scores, logits, torch.zeros_like(scores))[0]


def describe_balancing(config: Any) -> dict[str, str]:
    """Describe for `training.json` how the experts are balanced; return nothing for a dense model.

    Args:
        config: configuration of the model.

    Example:
        >>> describe_balancing(config)  # doctest: +SKIP
        {'balancing': 'aux_loss 0.01'}
    """
    return {"balancing": ", ".join(_methods(config)) or "none"} if config.num_moe_experts else {}


def _methods(config: Any) -> Iterator[str]:
    yield from (f"{kind} {value:g}" for kind, value in _balancing(config).items())
    if config.moe_z_loss_coeff:
        yield f"z_loss {config.moe_z_loss_coeff:g}"
    yield from (f"{name} {value:g}" for name, value in balancing_bias(config).items())
