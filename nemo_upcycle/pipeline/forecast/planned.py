"""A recipe as the planner takes it: its architecture, its layout, what a step works on, its cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.data.dense import check_address
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.pipeline.checks import is_local
from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.base import USUAL_CARD, asks_for_gpus
from nemo_upcycle.pipeline.recipes_io import ranks_of
from nemo_upcycle.planning.commands import fp8_precision
from nemo_upcycle.planning.hardware import Gpu, Machine, gpu_names, gpu_of_device, known_gpu, read_data
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.memory import GIB
from nemo_upcycle.planning.parameters import OPTIMIZER_BYTES, WEIGHT_BYTES
from nemo_upcycle.planning.search import Plan, PlanRequest, evaluate_layout
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.training.layout import layout_of
from nemo_upcycle.training.recompute import RecomputeFirstSteps


#: Sizes that tell one known parent from another, without its vocabulary.
_SHAPE = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "tied_embeddings")
_RECOMPUTES = {"moe": "moe", "mlp": "moe", "moe_act": "moe_act"}


@dataclass(frozen=True)
class Card:
    """The cards of a training.

    Args:
        gpu: what the planner knows of one; None without a GPU, or of one that it does not know.
        why: where `gpu` is from, or why there is none.
    """

    gpu: Gpu | None
    why: str


def card_of(recipe: Any, executor: Any, resources: Mapping[str, str]) -> Card:
    """Return the cards that a recipe will train on.

    Args:
        recipe: of the training.
        executor: where it runs; may name its `card`, as in `nemo-upcycle plan`. None: this machine.
        resources: what the training asks of it.
    """
    accelerator = getattr(recipe.trainer, "accelerator", "auto")
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


def model_of(recipe: Any, dense: str) -> tuple[Architecture, bool]:
    """Return the architecture that a recipe trains, and whether its vocabulary is known; else it counts no embedding.

    The vocabulary is that of the dense parent where it is a folder or a parent of this package's recipes, else that of
    the recipe's tokenizer.

    Args:
        recipe: of the training.
        dense: address of the parent.
    """
    config = recipe.model.config
    plain = architecture_of(config, 0)
    vocabulary = _vocabulary_of(dense) or getattr(config, "vocab_size", None)
    if not vocabulary:
        known = (shape for shape in read_data("recipes.yaml")["shapes"].values())
        vocabulary = next(
            (shape["vocab_size"] for shape in known if all(shape[name] == getattr(plain, name) for name in _SHAPE)),
            None,
        )
    if not vocabulary:
        size = getattr(getattr(recipe.data, "tokenizer", None), "vocab_size", None)
        vocabulary = size + 1 if isinstance(size, int) else None  # NullTokenizer's, which adds an end of document
    return (architecture_of(config, vocabulary), True) if vocabulary else (plain, False)


def _vocabulary_of(dense: str) -> int | None:
    parent = check_address(dense) if Path(dense.removeprefix("hf://")).expanduser().is_dir() else None
    return parent.vocab_size if parent else None


def saved_bytes(recipe: Any, arch: Architecture) -> int:
    """Return the size of a checkpoint with optimizer states."""
    weight_bytes = 4 if _precision(recipe).startswith("32") else WEIGHT_BYTES
    return (weight_bytes + OPTIMIZER_BYTES) * arch.total_params


def precision_name(recipe: Any) -> str:
    """Return the planner's name of a recipe's precision, or that of NeMo's where the planner knows none."""
    plugins, config = getattr(recipe.trainer, "plugins", None), recipe.model.config
    if not (getattr(plugins, "fp8", None) or getattr(config, "fp8", None)):
        precision = _precision(recipe)
        return "bf16" if precision.startswith("bf16") else precision
    return fp8_precision(getattr(plugins, "fp8_recipe", None) or getattr(config, "fp8_recipe", None))


def _precision(recipe: Any) -> str:
    return str(getattr(getattr(recipe.trainer, "plugins", None), "precision", "bf16"))


def workload_of(recipe: Any, arch: Architecture, recompute: str) -> Workload:
    """Return what a step of a recipe works on.

    Args:
        recipe: of the training.
        arch: of its model.
        recompute: one of the planner's kinds.

    Raises:
        SpecError: the planner does not know one of the settings.
    """
    config, data = recipe.model.config, recipe.data
    overlaps = any(getattr(callback, "tp_comm_overlap", False) for callback in _callbacks(recipe))
    return Workload(
        seq_length=data.seq_length,
        global_batch=data.global_batch_size,
        capacity_factor=config.moe_expert_capacity_factor if arch.num_experts else None,
        pad=bool(arch.num_experts and config.moe_pad_expert_input_to_capacity),
        precision=precision_name(recipe),
        recompute=recompute,
        dispatcher="deepep" if getattr(config, "moe_enable_deepep", False) else "alltoall",
        overlap=("tp",) if overlaps else (),
    )


def recompute_of(recipe: Any) -> str:
    """Return the planner's kind of a recipe's recomputation: what the model's configuration asks for."""
    config = recipe.model.config
    if config.recompute_granularity == "full":
        return "full"
    modules = (config.recompute_modules or []) if config.recompute_granularity == "selective" else []
    return next((_RECOMPUTES[name] for name in modules if name in _RECOMPUTES), "none")


def first_steps_of(recipe: Any) -> int:
    """Return after how many steps a recipe ceases to recompute its MoE layers; 0: it goes on as it begins."""
    return next((item.steps for item in _callbacks(recipe) if item.__fn_or_cls__ is RecomputeFirstSteps), 0)


def _callbacks(recipe: Any) -> list[Any]:
    return getattr(recipe.trainer, "callbacks", None) or []


def plans_of(recipe: Any, arch: Architecture, layout: Layout, gpu: Gpu) -> tuple[Plan, Plan]:
    """Return a recipe's plan in its first steps, and in all others; mostly they are the same.

    Args:
        recipe: of the training.
        arch: of its model.
        layout: its own.
        gpu: the card.

    Raises:
        SpecError: the planner does not know a setting, or a rule is broken.
    """
    first = recompute_of(recipe)
    later = "none" if first == "moe" and first_steps_of(recipe) else first
    plans = []
    for kind in (first, later):
        work = workload_of(recipe, arch, kind)
        if work.numbers.fp8 and gpu.fp8_tflops is None:
            raise SpecError("precision", got=work.precision, expected=f"bf16 on {gpu.name}", fix="use bf16")
        tokens = float(recipe.trainer.max_steps) * work.global_batch * work.seq_length
        grouped = bool(getattr(recipe.model.config, "moe_grouped_gemm", False))
        request = PlanRequest(
            arch, gpu, layout.gpus, work, tokens, Machine(), grouped, layout.micro_batch, recompute=kind
        )
        plans.append(evaluate_layout(request, layout))
    return plans[0], plans[1]


def planned_of(recipe: Any, dense: str, device: str) -> dict[str, float] | None:
    """Return what the planner gives for a training that ran, to stand beside what was measured.

    Args:
        recipe: of the training.
        dense: the parent's folder.
        device: name of its cards; none without GPUs.

    Returns:
        `memory_gib` of the fullest GPU and `tokens_per_s` of all; None where the planner does not know card or recipe.
    """
    gpu = gpu_of_device(device)
    if gpu is None:
        return None
    arch, _ = model_of(recipe, dense)
    nodes, per_node = ranks_of(recipe)
    layout = layout_of(recipe.trainer.strategy, nodes * per_node, recipe.data.micro_batch_size)
    try:
        first, later = plans_of(recipe, arch, layout, gpu)
    except SpecError:
        return None
    return {
        "memory_gib": max(first.memory.total, later.memory.total) / GIB,
        "tokens_per_s": later.tokens_per_s_per_gpu * layout.gpus,
    }
