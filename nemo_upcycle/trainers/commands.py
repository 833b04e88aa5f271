"""The command that runs a plan: the part that NeMo and Megatron-Bridge share. See `commands.py` in their folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.recipe_table import KnownRecipe
from nemo_upcycle.planning.search import LayoutEstimate
from nemo_upcycle.planning.workload import PRECISIONS, Workload


#: What the recipes, as Megatron, call what the planner calls a precision.
FP8_RECIPES = {"fp8-delayed": "delayed", "fp8-current": "tensorwise", "fp8-blockwise": "blockwise"}


def fp8_precision(recipe: str | None) -> str:
    """Give the planner's name of an FP8 recipe of Megatron's, or one made of it where the planner knows none.

    Example:
        >>> fp8_precision("tensorwise"), fp8_precision("mxfp8")
        ('fp8-current', 'mxfp8')
    """
    name = recipe or "delayed"
    if name in PRECISIONS:
        return name
    return {theirs: ours for ours, theirs in FP8_RECIPES.items()}.get(name, f"fp8-{name}")


def parallelism(layout: Layout, upcycled: bool) -> dict[str, Any]:
    """Write a layout in Megatron's settings, which are NeMo's and Bridge's."""
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.tp > 1,
    }
    if layout.pp > 1:
        settings |= {"num_layers_in_first_pipeline_stage": layout.first} if layout.first else {}
        settings |= {"num_layers_in_last_pipeline_stage": layout.last} if layout.last else {}
        settings |= {"account_for_embedding_in_pipeline_split": True} if layout.embedding else {}
        settings |= {"account_for_loss_in_pipeline_split": True} if layout.loss else {}
    if upcycled:
        settings |= {"expert_model_parallel_size": layout.ep, "expert_tensor_parallel_size": layout.etp}
    return settings


def recomputation(work: Workload) -> dict[str, Any]:
    """Write what is recomputed in Megatron's settings; None where one has no value."""
    names = ("granularity", "modules", "method", "num_layers")
    values: tuple[Any, ...] = ("selective", work.recompute.split(","), None, None)
    if work.recompute in ("none", "full"):
        values = ("full", None, "uniform", 1) if work.recompute == "full" else (None,) * len(names)
    return {f"recompute_{name}": value for name, value in zip(names, values, strict=True)}


def steps_of(plan: LayoutEstimate) -> int:
    """Return the steps of a plan's training."""
    return max(1, round(plan.request.tokens / plan.work.seq_length / plan.work.global_batch))


class Commands(ABC):
    """What a trainer's command line says of a plan.

    Attributes:
        title: how a text calls the trainer.
        software: generation of Megatron-Core that it has.
        gradients: what its recipes sum gradients in, where the command has no setting for it; None: it has.
    """

    title: ClassVar[str]
    software: ClassVar[str]
    gradients: ClassVar[str | None] = None

    @abstractmethod
    def precisions(self, work: Workload) -> tuple[str, ...]:
        """List the precisions that there is a setting for, with parameters kept as the work has them."""

    def why_no_recipe(self, recipe: KnownRecipe) -> str:
        """Say why the trainer has none of a recipe; "" where it has one."""
        return ""

    @abstractmethod
    def why_not(self, work: Workload) -> str:
        """Say what else no recipe has of a plan's settings; "" where one has all."""

    @abstractmethod
    def command(self, recipe: KnownRecipe, plan: LayoutEstimate, dense: str | None = None) -> str:
        """Write the command that runs a plan.

        Args:
            recipe: recipe that trains the model.
            plan: plan to run.
            dense: the dense parent's folder; None takes the recipe's own.
        """

    def why_no_command(self, recipe: KnownRecipe | None, work: Workload) -> str:
        """Explain why no recipe has a plan's settings; "" if one has.

        Args:
            recipe: recipe that trains the model; None if there is none.
            work: settings of the plan.
        """
        if recipe is None:
            return "No recipe of this package trains this model"
        if why := self.why_no_recipe(recipe):
            return why
        if work.precision not in (precisions := self.precisions(work)):
            kept = ", parameters too" if work.low_params else ""
            return f"No recipe for {self.title} trains in {work.precision}{kept}, only in {', '.join(precisions)}"
        return self.why_not(work)
