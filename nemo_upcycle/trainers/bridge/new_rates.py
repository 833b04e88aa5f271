"""Continue a rewound training in Bridge with the present rates, where a checkpoint brings the rates of its own time.

Megatron finds the saved state of a parameter group by the group's settings, which include the highest and the lowest
learning rate. The optimizer is therefore built with the saved rates, and gets the present ones before the first step.
"""

from __future__ import annotations

from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.utils.checkpoint_utils import get_checkpoint_run_config_filename, read_run_config

from nemo_upcycle.trainers.bridge.resharding import checkpoint_to_load


#: Learning rates in Bridge's settings of the optimizer -> name of the rate in a parameter group and in the scheduler.
_RATES = {"lr": "max_lr", "min_lr": "min_lr"}


def build_with_saved_rates(config: ConfigContainer) -> None:
    """Let Bridge build the optimizer with the rates of the checkpoint that it will load.

    Args:
        config: configuration of a run that has a checkpoint; changed in place. `NewRates` restores it.
    """
    saved = read_run_config(get_checkpoint_run_config_filename(checkpoint_to_load(config)))["optimizer"]
    for name in _RATES:
        setattr(config.optimizer, name, saved[name])


class NewRates(Callback):
    """Gives the optimizer and the schedule the present rates before the first step.

    Args:
        config: configuration of the run, with the present rates.
    """

    def __init__(self, config: ConfigContainer) -> None:
        self._wanted = {name: getattr(config.optimizer, name) for name in _RATES}

    def on_train_start(self, context: CallbackContext) -> None:
        """Set the rates."""
        optimizer, scheduler, settings = context.optimizer, context.scheduler, context.state.cfg.optimizer
        assert optimizer is not None
        assert scheduler is not None
        for name, rate in _RATES.items():
            built, wanted = getattr(settings, name), self._wanted[name]
            for group in optimizer.param_groups:
                if not group.get("is_decoupled_lr") and group.get(rate) is not None:
                    group[rate] = _scaled(group[rate], built, wanted)
            setattr(scheduler, rate, wanted)
            setattr(settings, name, wanted)
        scheduler.step(0)  # recomputes the rate of the next step


def _scaled(value: float, built: float, wanted: float) -> Any:
    """Return a group's rate for the wanted rate. Some groups train with a multiple of the optimizer's rate."""
    return wanted if value == built else value * wanted / built
