"""The command that runs a plan: the part that NeMo and Megatron-Bridge share (see `commands.py` in their folders)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.recipe_table import KnownRecipe
from nemo_upcycle.planning.search import LayoutEstimate
from nemo_upcycle.planning.workload import PRECISIONS, Workload


#: Maps the planner's name of a precision to the name of the FP8 recipe in Megatron and in this package's recipes.
FP8_RECIPES = {"fp8-delayed": "delayed", "fp8-current": "tensorwise", "fp8-blockwise": "blockwise"}


def fp8_precision(recipe: str | None) -> str:
    """Return the planner's name of a Megatron FP8 recipe, or `fp8-<recipe>` if the planner does not know the recipe.

    Example:
        >>> fp8_precision("tensorwise"), fp8_precision("mxfp8")
        ('fp8-current', 'mxfp8')
    """
    name = recipe or "delayed"
    if name in PRECISIONS:
        return name
    return {theirs: ours for ours, theirs in FP8_RECIPES.items()}.get(name, f"fp8-{name}")


def parallelism(layout: Layout, upcycled: bool) -> dict[str, Any]:
    """Return a layout as Megatron settings, which NeMo and Bridge share."""
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
    """Return the recomputation of a workload as Megatron settings; None for a setting without a value."""
    names = ("granularity", "modules", "method", "num_layers")
    values: tuple[Any, ...] = ("selective", work.recompute.split(","), None, None)
    if work.recompute in ("none", "full"):
        values = ("full", None, "uniform", 1) if work.recompute == "full" else (None,) * len(names)
    return {f"recompute_{name}": value for name, value in zip(names, values, strict=True)}


def steps_of(plan: LayoutEstimate) -> int:
    """Return the number of training steps of a plan."""
    return max(1, round(plan.request.tokens / plan.work.seq_length / plan.work.global_batch))


class Commands(ABC):
    """Writes the command that runs a plan in one trainer, or explains why there is no such command.

    Attributes:
        title: name of the trainer in texts.
        software: generation of Megatron-Core that the trainer has.
        gradients: type in which the trainer's recipes sum gradients; None: the command has a setting for this type.
    """

    title: ClassVar[str]
    software: ClassVar[str]
    gradients: ClassVar[str | None] = None

    @abstractmethod
    def precisions(self, work: Workload) -> tuple[str, ...]:
        """List the precisions that the trainer can set, given the workload's type of stored parameters."""

    def why_no_recipe(self, recipe: KnownRecipe) -> str:
        """Explain why the trainer lacks a recipe; "" if it has the recipe."""
        return ""

    @abstractmethod
    def why_not(self, work: Workload) -> str:
        """Explain which other settings of a plan are missing from all recipes; "" if a recipe has all of them."""

    @abstractmethod
    def command(self, recipe: KnownRecipe, plan: LayoutEstimate, dense: str | None = None) -> str:
        """Write the command that runs a plan.

        Args:
            recipe: recipe that trains the model.
            plan: plan to run.
            dense: folder of the dense parent; None: the recipe's own parent.
        """

    def why_no_command(self, recipe: KnownRecipe | None, work: Workload) -> str:
        """Explain why no recipe has a plan's settings; "" if a recipe has them.

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
