"""The command that runs a plan, in NeMo and in Megatron-Bridge.

Neither is imported: `nemo-upcycle plan` prints both.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from nemo_upcycle.planning.hardware import BRIDGE_SOFTWARE, DEFAULT_SOFTWARE
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.recipe_table import KnownRecipe
from nemo_upcycle.planning.search import Plan
from nemo_upcycle.planning.workload import PRECISIONS, Workload


#: What the recipes, as Megatron, call what the planner calls a precision.
FP8_RECIPES = {"fp8-delayed": "delayed", "fp8-current": "tensorwise", "fp8-blockwise": "blockwise"}
#: Whether parameters are kept in FP8 or FP4 -> those of Bridge's mixed precisions, which decide it.
BRIDGE_PRECISIONS = {
    False: {"bf16": "bf16_mixed", "fp8-blockwise": "bf16_with_fp8_subchannel_scaling_mixed"},
    True: {
        "fp8-delayed": "bf16_with_fp8_delayed_scaling_mixed",
        "fp8-current": "bf16_with_fp8_current_scaling_mixed",
        "mxfp8": "bf16_with_mxfp8_mixed",
        "nvfp4": "bf16_with_nvfp4_mixed",
    },
}


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


def _parallelism(layout: Layout, upcycled: bool) -> dict[str, Any]:
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


def _steps(plan: Plan) -> int:
    return max(1, round(plan.request.tokens / plan.work.seq_length / plan.work.global_batch))


def _fp8_settings(work: Workload) -> dict[str, Any]:
    """Name everything that NeMo's precision sets, for recipes without an own argument for it."""
    recipe = FP8_RECIPES.get(work.precision)
    settings: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_param_gather": work.low_params}
    if work.precision == "fp8-delayed":
        settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    if ends := work.numbers.bf16_ends:
        settings |= {"first_last_layers_bf16": True}
        settings |= {f"num_layers_at_{end}_in_bf16": ends for end in ("start", "end")}
    return settings


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
    def command(self, recipe: KnownRecipe, plan: Plan, dense: str | None = None) -> str:
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


class NeMoCommands(Commands):
    """The recipe's own arguments where it has them, NeMo's settings for the rest."""

    title = "NeMo"
    software = DEFAULT_SOFTWARE

    def precisions(self, work: Workload) -> tuple[str, ...]:
        """See `Commands.precisions`."""
        return ("bf16", *FP8_RECIPES)

    def why_not(self, work: Workload) -> str:
        """See `Commands.why_not`."""
        title = {"hybridep": "HybridEP", "ncclep": "NCCL EP"}.get(work.dispatcher)
        return f"NeMo 2.7 has no {title} (--backend bridge has it)" if title else ""

    def command(self, recipe: KnownRecipe, plan: Plan, dense: str | None = None) -> str:
        """See `Commands.command`; what a step works on needs no setting where it is the recipe's own."""
        layout, work, defaults, upcycled = plan.layout, plan.work, recipe.defaults, recipe.spec is not None
        per_node, steps = layout.node_gpus(plan.request.gpu.per_node), _steps(plan)
        settings = {f"trainer.strategy.{name}": value for name, value in _parallelism(layout, upcycled).items()}
        if work.seq_length != defaults["seq_length"]:
            settings |= {f"{where}.seq_length": work.seq_length for where in ("model.config", "data")}
        if work.global_batch != defaults["global_batch"]:
            settings["data.global_batch_size"] = work.global_batch
        if layout.micro_batch != 1:
            settings["data.micro_batch_size"] = layout.micro_batch
        settings["trainer.max_steps"] = steps
        arguments: dict[str, Any] = {"dense": dense} if dense else {}
        arguments |= {"num_nodes": layout.gpus // per_node, "num_gpus_per_node": per_node}
        if work.gradients != defaults["gradients"]:
            settings["trainer.plugins.grad_reduce_in_fp32"] = work.gradients == "fp32"
        takes_arguments = upcycled and recipe.h100
        if takes_arguments:
            arguments |= {"capacity_factor": work.capacity_factor or 0, "pad_to_capacity": work.pad}
            arguments["recompute_moe_steps"] = steps if work.recomputes("moe") else 0
            arguments |= {"dispatcher": work.dispatcher} if work.dispatcher != "alltoall" else {}
            arguments |= {"fp8_recipe": FP8_RECIPES[work.precision]} if work.precision in FP8_RECIPES else {}
            settings |= {"trainer.plugins.fp8_param_gather": True} if work.low_params else {}
        elif work.capacity_factor is not None:
            settings["model.config.moe_expert_capacity_factor"] = work.capacity_factor
            settings |= {"model.config.moe_pad_expert_input_to_capacity": True} if work.pad else {}
        if work.precision in FP8_RECIPES and not takes_arguments:
            settings |= {f"trainer.plugins.{name}": value for name, value in _fp8_settings(work).items()}
        if work.recompute != "moe" or not takes_arguments:
            again = {f"model.config.{name}": value for name, value in recomputation(work).items()}
            settings |= {name: value for name, value in again.items() if value is not None}
        call = f"{recipe.name}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
        words = [f"{name}={value}" for name, value in settings.items()]
        verb, quoted = (
            "finetune" if recipe.tunes else "pretrain",
            [f'"{word}"' if "[" in word else word for word in words],
        )
        return f'nemo llm {verb} --factory "{call}" ' + " ".join(quoted)


class BridgeCommands(Commands):
    """Megatron-Bridge's own `run_recipe.py`, on every rank."""

    title = "Bridge"
    software = BRIDGE_SOFTWARE
    gradients = "fp32"

    def precisions(self, work: Workload) -> tuple[str, ...]:
        """See `Commands.precisions`."""
        return tuple(BRIDGE_PRECISIONS[work.low_params])

    def word(self, value: Any) -> str:
        """Write a value as the command line takes it."""
        return "null" if value is None else str(value).replace("'", "").replace(" ", "")

    def why_no_recipe(self, recipe: KnownRecipe) -> str:
        """See `Commands.why_no_recipe`."""
        return "" if recipe.bridge else f"No recipe for Bridge is {recipe.name} (--backend nemo has it)"

    def why_not(self, work: Workload) -> str:
        """See `Commands.why_not`: its precisions decide what gradients are summed in."""
        is_fp32 = work.gradients == "fp32"
        return "" if is_fp32 else f"No recipe for Bridge sums gradients in {work.gradients}, only in fp32"

    def command(self, recipe: KnownRecipe, plan: Plan, dense: str | None = None) -> str:
        """See `Commands.command`."""
        layout, work = plan.layout, plan.work
        model: dict[str, Any] = _parallelism(layout, True) | {
            "moe_expert_capacity_factor": work.capacity_factor or None
        }
        model["moe_pad_expert_input_to_capacity"] = work.pad
        if work.dispatcher != "alltoall":
            model |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": work.dispatcher}
        if work.dispatcher == "ncclep":
            model["moe_expert_rank_capacity_factor"] = work.imbalance
        model |= {name: value for name, value in recomputation(work).items() if value is not None}
        settings = {f"model.{name}": self.word(value) for name, value in model.items()} | {
            "dataset.seq_length": work.seq_length,
            "train.global_batch_size": work.global_batch,
            "train.micro_batch_size": layout.micro_batch,
            "train.train_iters": _steps(plan),
            "mixed_precision": BRIDGE_PRECISIONS[work.low_params][work.precision],
        }
        per_node = layout.node_gpus(plan.request.gpu.per_node)
        launcher = f"torchrun --nnodes {layout.gpus // per_node} --nproc-per-node {per_node} -m nemo_upcycle.bridge"
        parts = [
            f"{launcher} Megatron-Bridge/scripts/training/run_recipe.py --recipe {recipe.bridge}",
            *(["--mode pretrain", "dataset.folder=$PWD/data"] if recipe.tunes else []),  # it upcycles as it starts
            *(shlex.quote(f"{name}={value}") for name, value in settings.items()),
            *([shlex.quote(f"{'upcycling.' if recipe.spec else ''}hf_model_path={dense}")] if dense else []),
            "checkpoint.save=$PWD/run checkpoint.load=$PWD/run",
        ]
        return " ".join(parts)


#: The trainers, by the names that `nemo-upcycle plan --backend` takes.
BACKENDS: dict[str, Commands] = {"nemo": NeMoCommands(), "bridge": BridgeCommands()}
