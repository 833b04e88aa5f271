"""Turn a recipe's training into plans of the planner: one for its first steps, and one for its later steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from nemo_upcycle.errors import SpecError
from nemo_upcycle.pipeline.executors.base import USUAL_CARD, asks_for_gpus
from nemo_upcycle.planning.hardware import Gpu, gpu_of_device, known_gpu
from nemo_upcycle.planning.memory import GIB
from nemo_upcycle.planning.search import LayoutEstimate, PlanRequest, evaluate_layout
from nemo_upcycle.planning.workload import USUAL_IMBALANCE, Workload
from nemo_upcycle.trainers.facts import TrainingFacts


def gpu_of_training(accelerator: str, executor: Any, resources: Mapping[str, str]) -> tuple[Gpu | None, str]:
    """Return the kind of GPU that a training will run on.

    Args:
        accelerator: accelerator in the recipe.
        executor: executor of the training; its field `card` may name the GPU as in `nemo-upcycle plan`. None stands
            for this machine.
        resources: resources that the training asks the executor for.

    Returns:
        The planner's GPU and a text. The GPU is None if the training has no GPU or the planner does not know the GPU.
        The text says how the GPU was found, or why it is None.
    """
    if accelerator == "cpu":
        return None, "the recipe trains on the CPU"
    if executor is None and torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
        gpu = gpu_of_device(device)
        return gpu, "of this machine" if gpu else f"the planner does not know {device}"
    if executor is None and accelerator == "auto":
        return None, "no GPU here"
    if accelerator == "auto" and not asks_for_gpus(resources):
        return None, "no GPU is asked for"
    name = getattr(executor, "card", None)
    return known_gpu(name or USUAL_CARD), "as the executor says" if name else "assumed"


def plans_of(facts: TrainingFacts, gpu: Gpu) -> tuple[LayoutEstimate, LayoutEstimate]:
    """Return the plan of a training's first steps and the plan of its later steps. Usually, both plans are equal.

    Args:
        facts: facts of the training.
        gpu: kind of GPU.

    Raises:
        SpecError: the planner does not know a setting, or the layout breaks a rule.
    """
    computation = facts.computation
    work = Workload(
        seq_length=facts.seq_length,
        global_batch=facts.global_batch,
        capacity_factor=computation.capacity_factor,
        pad=computation.pad,
        imbalance=computation.rank_capacity or USUAL_IMBALANCE,
        precision=facts.profile.precision,
        low_params=computation.low_params,
        gradients=computation.gradients,
        optimizer=computation.optimizer,
        recompute=computation.recompute,
        dispatcher=_dispatcher(facts),
        overlap=computation.overlap,
        lora=computation.lora,
    )
    request = PlanRequest(
        arch=facts.arch,
        gpu=gpu,
        gpus=facts.layout.gpus,
        work=work,
        tokens=float(facts.steps) * facts.step_tokens,
        software=computation.software,
        grouped=computation.grouped,
        micro_batch=facts.layout.micro_batch,
        recompute=computation.recompute,
    )
    first = evaluate_layout(request, facts.layout)
    if computation.recompute != "moe" or not computation.first_steps:
        return first, first
    return first, evaluate_layout(replace(request, recompute="none"), facts.layout)


def _dispatcher(facts: TrainingFacts) -> str:
    """Return the name of the dispatcher that sends tokens to experts. If each rank has all experts, nothing is sent.

    Raises:
        SpecError: the size of NCCL EP's receive buffers is missing.
    """
    layout, name = facts.layout, facts.profile.dispatcher
    if layout.ep * layout.etp == 1 or not facts.arch.num_experts:
        return "alltoall"
    if name == "ncclep" and facts.computation.rank_capacity is None:
        raise SpecError(
            field="moe_expert_rank_capacity_factor",
            kind="missing",
            got="is missing, and ncclep needs it for the size of its receive buffers",
            fix="set it to 1.5, for example. Training ends if a rank gets more than this multiple of its share",
        )
    return name


def planned_of(facts: TrainingFacts | None, device: str) -> dict[str, float] | None:
    """Plan a finished training, to compare the plan with the measurements.

    Args:
        facts: facts of the training; None if they are unknown.
        device: the driver's name for the training's GPUs; empty without GPUs.

    Returns:
        `memory_gib` of the fullest GPU and `tokens_per_s` of all GPUs; None if the planner does not know the GPU or
        the recipe.
    """
    gpu = gpu_of_device(device)
    if gpu is None or facts is None:
        return None
    try:
        first, later = plans_of(facts, gpu)
    except SpecError:
        return None
    return {
        "memory_gib": max(first.memory.total, later.memory.total) / GIB,
        "tokens_per_s": later.tokens_per_s_per_gpu * facts.layout.gpus,
    }
