"""The command that trains a planned layout in NeMo; this file does not import NeMo."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.planning.hardware import DEFAULT_SOFTWARE
from nemo_upcycle.planning.recipe_table import KnownRecipe
from nemo_upcycle.planning.search import LayoutEstimate
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.trainers.commands import FP8_RECIPES, Commands, parallelism, recomputation, steps_of


class NeMoCommands(Commands):
    """Writes NeMo's command: the arguments that the recipe has, and NeMo's settings for everything else."""

    title = "NeMo"
    software = DEFAULT_SOFTWARE

    def precisions(self, work: Workload) -> tuple[str, ...]:
        """See `Commands.precisions`."""
        return ("bf16", *FP8_RECIPES)

    def why_not(self, work: Workload) -> str:
        """See `Commands.why_not`."""
        title = {"hybridep": "HybridEP", "ncclep": "NCCL EP"}.get(work.dispatcher)
        return f"NeMo 2.7 has no {title} (--backend bridge has it)" if title else ""

    def command(self, recipe: KnownRecipe, plan: LayoutEstimate, dense: str | None = None) -> str:
        """See `Commands.command`; values that equal the recipe's defaults are omitted."""
        layout, work, defaults, upcycled = plan.layout, plan.work, recipe.defaults, recipe.spec is not None
        per_node, steps = layout.node_gpus(plan.request.gpu.per_node), steps_of(plan)
        settings = {f"trainer.strategy.{name}": value for name, value in parallelism(layout, upcycled).items()}
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


def _fp8_settings(work: Workload) -> dict[str, Any]:
    """Return every FP8 setting of NeMo's precision plugin, for recipes that have no argument for FP8."""
    recipe = FP8_RECIPES.get(work.precision)
    settings: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_param_gather": work.low_params}
    if work.precision == "fp8-delayed":
        settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    if ends := work.numbers.bf16_ends:
        settings |= {"first_last_layers_bf16": True}
        settings |= {f"num_layers_at_{end}_in_bf16": ends for end in ("start", "end")}
    return settings
