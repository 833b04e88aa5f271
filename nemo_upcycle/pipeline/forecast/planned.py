"""A training as the planner takes it: on its cards, in its first steps and in all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_upcycle.errors import SpecError
from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.base import USUAL_CARD, asks_for_gpus, is_local
from nemo_upcycle.planning.hardware import Gpu, Machine, gpu_names, gpu_of_device, known_gpu
from nemo_upcycle.planning.memory import GIB
from nemo_upcycle.planning.search import Plan, PlanRequest, evaluate_layout
from nemo_upcycle.planning.workload import DISPATCHERS, Workload
from nemo_upcycle.trainers.base import TrainingFacts


@dataclass(frozen=True)
class Card:
    """The cards of a training.

    Args:
        gpu: what the planner knows of one; None without a GPU, or of one that it does not know.
        why: where `gpu` is from, or why there is none.
    """

    gpu: Gpu | None
    why: str


def card_of(accelerator: str, executor: Any, resources: Mapping[str, str]) -> Card:
    """Return the cards that a training will run on.

    Args:
        accelerator: what its recipe asks for.
        executor: where it runs; may name its `card`, as in `nemo-upcycle plan`. None: this machine.
        resources: what the training asks of it.
    """
    if accelerator == "cpu":
        return Card(None, "the recipe trains on the CPU")
    if is_local(executor) and torch.cuda.is_available():
        return _card_here(torch.cuda.get_device_name(0))
    if is_local(executor) and accelerator == "auto":
        return Card(None, "no GPU here")
    if accelerator == "auto" and not asks_for_gpus(resources):
        return Card(None, "no GPU is asked for")
    name = getattr(executor, "card", None)
    if name in performance.table()["cards"] and name not in gpu_names():
        return Card(None, f"the planner does not know {name}")
    return Card(known_gpu(name or USUAL_CARD), "as the executor says" if name else "assumed")


def _card_here(device: str) -> Card:
    gpu = gpu_of_device(device)
    return Card(gpu, "of this machine") if gpu else Card(None, f"the planner does not know {device}")


def plans_of(facts: TrainingFacts, gpu: Gpu) -> tuple[Plan, Plan]:
    """Return the plan of a training in its first steps, and in all others; mostly they are the same.

    Args:
        facts: of the training.
        gpu: the card.

    Raises:
        SpecError: the planner does not know a setting, or a rule is broken.
    """
    later = "none" if facts.recompute == "moe" and facts.first_steps else facts.recompute
    return _plan(facts, gpu, facts.recompute), _plan(facts, gpu, later)


def _plan(facts: TrainingFacts, gpu: Gpu, recompute: str) -> Plan:
    dispatcher = facts.profile.dispatcher
    work = Workload(
        seq_length=facts.seq_length,
        global_batch=facts.global_batch,
        capacity_factor=facts.capacity_factor,
        pad=facts.pad,
        precision=facts.profile.precision,
        recompute=recompute,
        dispatcher=dispatcher if dispatcher in DISPATCHERS else "alltoall",
        overlap=facts.overlap,
    )
    if work.numbers.fp8 and gpu.fp8_tflops is None:
        raise SpecError("precision", got=work.precision, expected=f"bf16 on {gpu.name}", fix="use bf16")
    tokens, layout = float(facts.steps) * facts.step_tokens, facts.layout
    request = PlanRequest(
        facts.arch,
        gpu,
        layout.gpus,
        work,
        tokens,
        Machine(),
        facts.grouped,
        layout.micro_batch,
        recompute=recompute,
    )
    return evaluate_layout(request, layout)


def planned_of(facts: TrainingFacts | None, device: str) -> dict[str, float] | None:
    """Return what the planner gives for a training that ran, to stand beside what was measured.

    Args:
        facts: of the training; None: not known.
        device: name of its cards; none without GPUs.

    Returns:
        `memory_gib` of the fullest GPU and `tokens_per_s` of all; None where the planner does not know card or recipe.
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
