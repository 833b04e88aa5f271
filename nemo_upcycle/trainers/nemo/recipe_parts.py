"""Changes to NeMo recipes that several recipes share."""

from __future__ import annotations

from typing import Any

import nemo_run as run
import torch
from nemo import lightning as nl

from nemo_upcycle.cpu.backend import cpu_has_fast_bf16
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.nemo.retention import RetainedCheckpoints
from nemo_upcycle.trainers.nemo.upcycled import moe_settings
from nemo_upcycle.trainers.recipe_arguments import moe_kernels


def change_model(model: run.Config, **fields: Any) -> run.Config:
    """Set fields of a model's configuration, in place, and return the model."""
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


def with_experts(model: run.Config, spec: UpcycleSpec, *, capacity_factor: float | None) -> run.Config:
    """Add experts to a dense model's configuration, for GPUs, in place.

    Args:
        model: configuration of the dense model.
        spec: how to upcycle.
        capacity_factor: token slots of an expert, as a multiple of a balanced share; None: no limit.
    """
    return change_model(model, **moe_settings(spec), **moe_kernels(capacity_factor=capacity_factor))


def validate(trainer: run.Config[nl.Trainer], times: int) -> None:
    """Let a trainer validate `times` times, and also before the first step, each time on one global batch."""
    trainer.enable_progress_bar = False  # MetricsLogger prints more
    trainer.limit_val_batches, trainer.limit_test_batches = 1, 0
    trainer.val_check_interval = max(1, trainer.max_steps // times)
    trainer.num_sanity_val_steps = 1  # validation starts with the parent's own loss


def in_float32_if_faster(trainer: run.Config[nl.Trainer]) -> None:
    """Let a trainer without a GPU compute in float32 if the processor has no fast bfloat16."""
    if not cpu_has_fast_bf16():
        trainer.plugins = run.Config(nl.MegatronMixedPrecision, precision="32", params_dtype=torch.float32)


def recompute_layers(config: run.Config) -> None:
    """Let a model keep only the layers' inputs as activations, and recompute all other activations."""
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1


def checkpoints(every_n_steps: int, keep_last: int = 1) -> run.Config[nl.ModelCheckpoint]:
    """Make a checkpoint callback that keeps only the newest `keep_last` checkpoints.

    NeMo's default saves every 15 minutes and keeps the ten best: 6.6 TB for an upcycled 8B model.

    Args:
        every_n_steps: steps between two checkpoints.
        keep_last: number of newest checkpoints to keep.
    """
    return run.Config(
        RetainedCheckpoints,
        keep_last=keep_last,
        save_last=True,
        save_top_k=0,
        save_optim_on_train_end=True,  # otherwise a finished run cannot be trained further
        monitor=None,
        every_n_train_steps=every_n_steps,
        filename="{model_name}--{step}",
    )
