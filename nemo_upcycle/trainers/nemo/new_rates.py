"""Continue a rewound training in NeMo with the present rates, where a checkpoint brings the rates of its own time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any


#: Entries of a parameter group that belong to the state of a training. All other entries are settings.
_STATE = ("params", "step", "lr")


def group_settings(optimizers: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """Return the settings, such as weight decay, of each optimizer's parameter groups."""
    return [
        [{name: value for name, value in group.items() if name not in _STATE} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def apply_rates(
    optimizers: Sequence[Any],
    settings: Sequence[Sequence[dict[str, Any]]],
    schedulers: Sequence[Any],
    saved: Sequence[dict[str, Any]],
) -> None:
    """Give loaded optimizers their present settings, and the saved states of schedulers the present schedule.

    Args:
        optimizers: optimizers, after their states are loaded.
        settings: result of `group_settings`.
        schedulers: scheduler of each optimizer, before its state is loaded.
        saved: saved state of each scheduler; changed in place. Only the number of steps is kept.
    """
    for optimizer, groups in zip(optimizers, settings, strict=True):
        for group, present in zip(optimizer.param_groups, groups, strict=True):
            group.update(present)
    for optimizer, scheduler, state in zip(optimizers, schedulers, saved, strict=False):
        scheduler.last_epoch = state["last_epoch"]
        with warnings.catch_warnings():  # NeMo warns about every call from outside
            warnings.simplefilter("ignore")
            rates = scheduler.get_lr()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        kept = {"last_epoch": state["last_epoch"], "_step_count": state["_step_count"], "_last_lr": rates}
        state.clear()
        state.update(scheduler.state_dict() | kept)
