"""The command that runs a plan in Megatron-Bridge. This module does not import Bridge."""

from __future__ import annotations

import shlex
from typing import Any

from nemo_upcycle.planning.hardware import BRIDGE_SOFTWARE
from nemo_upcycle.planning.recipe_table import KnownRecipe
from nemo_upcycle.planning.search import LayoutEstimate
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.trainers.commands import Commands, parallelism, recomputation, steps_of


#: Bridge's mixed precision, by whether parameters stay in FP8 or FP4, and then by the planner's precision.
BRIDGE_PRECISIONS = {
    False: {"bf16": "bf16_mixed", "fp8-blockwise": "bf16_with_fp8_subchannel_scaling_mixed"},
    True: {
        "fp8-delayed": "bf16_with_fp8_delayed_scaling_mixed",
        "fp8-current": "bf16_with_fp8_current_scaling_mixed",
        "mxfp8": "bf16_with_mxfp8_mixed",
        "nvfp4": "bf16_with_nvfp4_mixed",
    },
}


class BridgeCommands(Commands):
    """The command that runs Megatron-Bridge's own `run_recipe.py` on every rank."""

    title = "Bridge"
    software = BRIDGE_SOFTWARE
    gradients = "fp32"

    def precisions(self, work: Workload) -> tuple[str, ...]:
        """See `Commands.precisions`."""
        return tuple(BRIDGE_PRECISIONS[work.low_params])

    def word(self, value: Any) -> str:
        """Write a value in the form of Bridge's command line."""
        return "null" if value is None else str(value).replace("'", "").replace(" ", "")

    def why_no_recipe(self, recipe: KnownRecipe) -> str:
        """See `Commands.why_no_recipe`."""
        return "" if recipe.bridge else f"No recipe for Bridge is {recipe.name} (--backend nemo has it)"

    def why_not(self, work: Workload) -> str:
        """See `Commands.why_not`; the precision decides in which type Bridge's recipes sum gradients."""
        is_fp32 = work.gradients == "fp32"
        return "" if is_fp32 else f"No recipe for Bridge sums gradients in {work.gradients}, only in fp32"

    def command(self, recipe: KnownRecipe, plan: LayoutEstimate, dense: str | None = None) -> str:
        """See `Commands.command`."""
        layout, work = plan.layout, plan.work
        model: dict[str, Any] = parallelism(layout, True) | {
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
            "train.train_iters": steps_of(plan),
            "mixed_precision": BRIDGE_PRECISIONS[work.low_params][work.precision],
        }
        per_node = layout.node_gpus(plan.request.gpu.per_node)
        launcher = f"torchrun --nnodes {layout.gpus // per_node} --nproc-per-node {per_node} -m nemo_upcycle.bridge"
        parts = [
            f"{launcher} Megatron-Bridge/scripts/training/run_recipe.py --recipe {recipe.bridge}",
            *(["--mode pretrain", "dataset.folder=$PWD/data"] if recipe.tunes else []),  # a tuning upcycles first
            *(shlex.quote(f"{name}={value}") for name, value in settings.items()),
            *([shlex.quote(f"{'upcycling.' if recipe.spec else ''}hf_model_path={dense}")] if dense else []),
            "checkpoint.save=$PWD/run checkpoint.load=$PWD/run",
        ]
        return " ".join(parts)
