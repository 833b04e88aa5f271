"""Make the router's auxiliary losses act with their configured coefficients in every layout, and describe them.

Each rank of a tensor- and context-parallel group computes an auxiliary loss for its own tokens. Megatron sums
gradients over tensor-parallel ranks and averages them over data- and context-parallel ranks, so the loss scale must
contain the context-parallel size. In megatron-core 0.15 this factor is missing. With `calculate_per_token_loss` the
tensor-parallel size is missing, too. `global_aux_loss` is split over data-parallel ranks as well, and the
data-parallel size is missing in every release up to 0.19. The missing factor is measured, not looked up by version,
because containers can have releases with additional fixes.
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
#: Settings of the router that is measured: plain top-1, no dropped tokens, no random numbers, no loss scale.
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
    """Multiply Megatron's auxiliary losses by the factor that they lack in this layout, for this process.

    The factor goes into the loss scale, as in Megatron 0.16. The loss scale reaches every auxiliary loss and
    schedule, so the factor works with coefficients that change during training and with FP16's loss scale. If nothing
    is missing, Megatron stays unchanged. If the global loss lacks a further factor, its coefficient is multiplied by
    that factor when a router asks for the coefficient.

    Args:
        config: configuration of the model. Megatron's groups must exist, and every rank must call this function.

    Returns:
        The configured and the acting coefficient of each auxiliary loss. The first rank logs the differences.
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
    """Report the auxiliary losses that do not act as configured, and the losses that this package corrects."""
    for loss in losses:
        if loss.acting != loss.coefficient:
            text = "%s: a coefficient of %g acts as %g (%s); to compensate, set a coefficient %.4g times as large"
            show_messages().warning(
                text, loss.name, loss.coefficient, loss.acting, loss.why, loss.coefficient / loss.acting
            )
        elif loss.why != "as set":
            show_messages().info("%s: a coefficient of %g acts as set (%s)", loss.name, loss.coefficient, loss.why)


def _multiply_scale(factor: float) -> None:
    """Multiply the auxiliary-loss scale that Megatron's schedules set by `factor`; 1 restores Megatron's function."""
    original = getattr(MoEAuxLossAutoScaler.set_loss_scale, "__wrapped__", MoEAuxLossAutoScaler.set_loss_scale)

    @functools.wraps(original)
    def set_loss_scale(scale: torch.Tensor) -> None:
        original(scale * factor)

    MoEAuxLossAutoScaler.set_loss_scale = staticmethod(original if factor == 1 else set_loss_scale)


def _multiply_global(factor: float) -> None:
    """Multiply the coefficient of the routers' global loss by `factor`; 1 restores Megatron's own method.

    Megatron divides the loss that it logs by the same number, so the logged loss does not change.
    """
    original = getattr(TopKRouter.get_aux_loss_coeff, "__wrapped__", TopKRouter.get_aux_loss_coeff)

    @functools.wraps(original)
    def get_aux_loss_coeff(router: TopKRouter, aux_loss_type: str) -> float:
        coefficient: float = original(router, aux_loss_type)
        return coefficient * factor if aux_loss_type == GLOBAL else coefficient

    TopKRouter.get_aux_loss_coeff = original if factor == 1 else get_aux_loss_coeff


def _coefficients(config: Any) -> dict[str, float]:
    """Return the coefficients that are not zero, by the names of the losses."""
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
    """Return a router's gradient from a loss of coefficient 1, divided by the correct gradient.

    Every rank routes the same token, so the loss over all ranks equals the loss of a single rank. For balancing, this
    loss is E * p_0 (all tokens go to expert 0, with probability p_0). For the z-loss, it is the squared logsumexp of
    the logits.
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
    # Megatron sums gradients over tensor-parallel ranks. With a loss per token, it divides the sum by the tokens.
    if not config.calculate_per_token_loss:
        got = got * parallel_state.get_tensor_model_parallel_world_size()
    return float((got * expected).sum() / expected.square().sum())


def gradient_of_losses(router: TopKRouter, logits: torch.Tensor) -> torch.Tensor:
    """Compute this rank's part of the gradient that a router's auxiliary losses add to its logits.

    Args:
        router: a router in training mode.
        logits: leaf tensor that requires a gradient, [S, B, E].
    """
    with temporarily_set(MoEAuxLossAutoScaler, "main_loss_backward_scale", None):
        scores, _ = router.routing(logits)
        # A schedule makes this call after every forward step. Here the call acts as for a stage without a loss.
        context = parallel_state.get_context_parallel_world_size()
        forward_step_calc_loss(None, scores, None, router.config, None, False, 1, [], context, False)
        return torch.autograd.grad(scores, logits, torch.zeros_like(scores))[0]


def describe_balancing(config: Any) -> dict[str, str]:
    """Describe for `training.json` how the experts are balanced; return an empty dict for a dense model.

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
