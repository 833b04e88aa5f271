"""What every upcycling recipe does to the NeMo recipe it derives from."""

from __future__ import annotations

from typing import Any

import nemo_run as run
from nemo import lightning as nl

from nemo_upcycle.trainers.nemo.retention import RetainedCheckpoints
from nemo_upcycle.trainers.nemo.upcycled import moe_settings, start_from, upcycled, use_spec


__all__ = ["change_model", "checkpoints", "moe_settings", "start_from", "upcycled", "use_spec"]


def change_model(model: run.Config, **fields: Any) -> run.Config:
    """Set fields of a model's configuration, in place, and return the model."""
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


def checkpoints(every_n_steps: int, keep_last: int = 1) -> run.Config[nl.ModelCheckpoint]:
    """Make a checkpoint callback that keeps the last state only, or few of them.

    NeMo's default keeps the ten best, every 15 minutes: 6.6 TB for an upcycled 8B model.

    Args:
        every_n_steps: steps between two checkpoints.
        keep_last: how many of the newest to keep.
    """
    return run.Config(
        RetainedCheckpoints,
        keep_last=keep_last,
        save_last=True,
        save_top_k=0,
        save_optim_on_train_end=True,  # else a finished run cannot be trained further
        monitor=None,
        every_n_train_steps=every_n_steps,
        filename="{model_name}--{step}",
    )
