"""NeMo recipes that train for a few steps, on one GPU or on a CPU, to show that a chain works."""

from __future__ import annotations

from typing import Any

import nemo_run as run
import torch
from nemo import lightning as nl
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.recipes import llama3_8b
from nemo.collections.llm.recipes.log.default import default_log, default_resume
from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing

from nemo_upcycle.data.blend import DEMO
from nemo_upcycle.data.blend_module import blend_data
from nemo_upcycle.planning.recipe_table import Schedule
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.nemo.recipe_parts import (
    checkpoints,
    in_float32_if_faster,
    recompute_layers,
    validate,
)
from nemo_upcycle.trainers.nemo.upcycled import start_from


def few_steps_trainer(schedule: Schedule, num_nodes: int, num_gpus_per_node: int) -> run.Config[nl.Trainer]:
    """Configure NeMo's Llama 3 trainer without model parallelism, on GPUs if there are any, else on the CPU.

    Args:
        schedule: schedule that sets the number of steps.
        num_nodes: compute nodes.
        num_gpus_per_node: GPUs of a node; without CUDA, processes.
    """
    config = llama3_8b.trainer(
        context_parallelism=1,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        max_steps=schedule.steps,
    )
    config.accelerator = "auto"
    config.log_every_n_steps = 1
    validate(config, times=2)
    # On a CPU an asynchronous save forks this process. The process then changes its memory, which doubles the use.
    config.strategy.ckpt_async_save = False
    config.strategy.ddp.check_for_nan_in_grad = False  # LossGuard ends all ranks, Megatron's check only one
    if not torch.cuda.is_available():
        in_float32_if_faster(config)
    return config


def few_steps_recipe(
    model: run.Config,
    schedule: Schedule,
    dense: str,
    data: str | None,
    *,
    spec: UpcycleSpec | None = None,
    expert_parallelism: int = 1,
    dir: str | None,
    name: str,
    num_nodes: int,
    num_gpus_per_node: int,
    fn: Any = None,
) -> run.Partial:
    """Make the recipe that trains a small model for a few steps.

    Args:
        model: the model, dense or upcycled.
        schedule: steps, batches and learning rates.
        dense: dense checkpoint to start from.
        data: finished folder of `nemo-upcycle data`; None: the demo's blend, built on first use.
        spec: how to upcycle; None: the dense baseline.
        expert_parallelism: ranks that the experts are spread over.
        dir: folder for logs and checkpoints.
        name: name of the run.
        num_nodes: compute nodes.
        num_gpus_per_node: GPUs of a node; without CUDA, processes.
        fn: function that trains; None: NeMo's `pretrain`.
    """
    recipe = run.Partial(
        fn or pretrain,
        model=model,
        trainer=few_steps_trainer(schedule, num_nodes, num_gpus_per_node),
        data=run.Config(
            blend_data,
            dense=dense,
            blend=DEMO,
            seq_length=schedule.seq_length,
            global_batch_size=schedule.global_batch,
            micro_batch_size=1,
            num_workers=0,
        ),
        log=default_log(dir=dir, name=name),
        optim=distributed_fused_adam_with_cosine_annealing(
            warmup_steps=schedule.warmup_steps, constant_steps=0, max_lr=schedule.lr, min_lr=schedule.min_lr
        ),
        resume=default_resume(),
    )
    recipe.log.ckpt = checkpoints(every_n_steps=10)
    if spec:
        recipe.trainer.strategy.expert_model_parallel_size = expert_parallelism
    return start_from(recipe, dense, spec, data)


def laptop_ranks() -> int:
    """Return the number of ranks for a chain's trainings on this machine: one if it has a single GPU, else two."""
    return 1 if torch.cuda.device_count() == 1 else 2


def fit_laptop(recipe: run.Partial) -> run.Partial:
    """Let an upcycled model's recipe recompute its layers if there is no GPU; change it in place and return it.

    A laptop has memory for 692M parameters and their Adam states, but can keep only the layers' inputs as activations.
    """
    if not torch.cuda.is_available():
        recompute_layers(recipe.model.config)
    return recipe
