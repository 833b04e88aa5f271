"""Correct auxiliary losses at the start of a training, and describe how it balances its experts, for both trainers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nemo_upcycle.models.balancing import balancing_bias
from nemo_upcycle.online.receipt import ActingCoefficient
from nemo_upcycle.trainers.schedules import Anneal
from nemo_upcycle.utils.progress import show_messages


def correct_auxiliary_losses(config: Any) -> list[ActingCoefficient]:
    """Make auxiliary losses act with the coefficients that are set, and log corrections on the first rank.

    Every rank must call this, after Megatron's groups are made. A Megatron without the functions that measure the
    losses is left as it is, with a warning.

    Args:
        config: configuration of the model.

    Returns:
        The coefficients that are set and that act, for each auxiliary loss of the model.
    """
    try:
        from nemo_upcycle.trainers import aux_loss
    except ImportError as error:
        if torch.distributed.get_rank() == 0:
            show_messages().warning("auxiliary losses act as Megatron has them, not measured: %s", error.msg)
        return []
    losses = aux_loss.correct_losses(config)
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


def describe_balancing(config: Any, anneal: Anneal | None) -> dict[str, str]:
    """Describe for `training.json` how the experts are balanced; return nothing for a dense model.

    Args:
        config: configuration of the model.
        anneal: change of the coefficient over the training; None: it stays.

    Example:
        >>> describe_balancing(config, Anneal(start=0.01, end=0.001, steps=2000))  # doctest: +SKIP
        {'balancing': 'aux_loss 0.01, to 0.001 in the first 2000 steps (cosine)'}
    """
    return {"balancing": ", ".join(_methods(config, anneal)) or "none"} if config.num_moe_experts else {}


def _methods(config: Any, anneal: Anneal | None) -> Iterator[str]:
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    pairs = zip(kinds, coefficients, strict=True) if isinstance(kinds, list) else [(kinds, coefficients)]
    yield from (f"{kind} {value:g}" for kind, value in pairs if kind.endswith("aux_loss"))
    if anneal and anneal.steps:
        yield f"to {anneal.end:g} in the first {anneal.steps} steps ({anneal.shape})"
    if config.moe_z_loss_coeff:
        yield f"z_loss {config.moe_z_loss_coeff:g}"
    yield from (f"{name} {value:g}" for name, value in balancing_bias(config).items())
