"""Llama 3.2 3B upcycled to 8 experts with top-2 routing, and its dense baseline.

The upcycled model has 18.01B parameters (5.33B active). Both models train on 100B tokens, as in arXiv 2412.09952.
"""

from collections.abc import Callable
from typing import Any, Optional

from nemo_upcycle.planning.recipe_table import Run, Schedule, on_gpus
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.recipe_arguments import with_help, with_overrides


TITLE = "Llama 3.2 3B"
PARENT = "hf://meta-llama/Llama-3.2-3B"
SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: Token slots per expert, as a multiple of the balanced share. With 8 experts and top-2, a factor of 4 drops nothing.
CAPACITY_FACTOR = 4.0
#: GPU model -> training -> number of GPUs and layout. Experts are spread over eight ranks (EP8) and never cut.
#: By the planner's estimate, the layouts fit an H100's 80 GB with room to spare.
LAYOUTS = {
    "h100": {
        "e8t2": Run(gpus=64, cp=2),
        "dense": Run(gpus=64, cp=2),
    },
}
TRAINING = Schedule(seq_length=8192, global_batch=512, steps=23_842, lr=3e-5, min_lr=3e-7, warmup_steps=100)
DATA, EVALUATION = "redpajama_v2_academic_7_3", "paper"


def dense_model() -> Any:
    """Make the dense model in NeMo."""
    from nemo.collections.llm.recipes.llama32_3b import model

    return model()


def moe_model() -> Any:
    """Make the upcycled model in NeMo."""
    from nemo_upcycle.trainers.nemo.recipe_parts import with_experts

    return with_experts(dense_model(), SPEC, capacity_factor=CAPACITY_FACTOR)


@with_overrides
def e8t2(
    dir: Optional[str] = None,
    name: str = "llama32_3b_e8t2",
    num_nodes: int = 8,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = PARENT,
    data: Optional[str] = None,
    fn: Optional[Callable] = None,
) -> Any:
    """Upcycle Llama 3.2 3B online and continue training in NeMo, as in arXiv 2412.09952."""
    from nemo.collections.llm.recipes import llama3_8b

    from nemo_upcycle.trainers.nemo.paper_recipe import fast_run, upcycled_recipe

    named = {"dir": dir, "name": name, "num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node, "fn": fn}
    recipe = upcycled_recipe(llama3_8b, moe_model(), LAYOUTS["h100"]["e8t2"], TRAINING, SPEC, dense, data, **named)
    return fast_run(recipe, LAYOUTS["h100"]["e8t2"]) if performance_mode else recipe


@with_help
def dense_ct(
    dir: Optional[str] = None,
    name: str = "llama32_3b_dense_ct",
    num_nodes: int = 8,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = PARENT,
    data: Optional[str] = None,
    fn: Optional[Callable] = None,
) -> Any:
    """Continue training dense Llama 3.2 3B in NeMo, as the baseline of `llama32_3b_e8t2` on the same data."""
    from nemo.collections.llm.recipes import llama3_8b

    from nemo_upcycle.trainers.nemo.paper_recipe import dense_recipe

    named = {"dir": dir, "name": name, "num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node, "fn": fn}
    named["performance_mode"] = performance_mode
    return dense_recipe(llama3_8b, dense_model(), LAYOUTS["h100"]["dense"], TRAINING, dense, data, **named)


@on_gpus(LAYOUTS["h100"]["e8t2"].gpus, "h100")
def llama32_3b_e8t2_pretrain_64gpu_h100_bf16_config(
    dense: str = PARENT, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the upcycled model's training in Megatron-Bridge, on 64 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import upcycled_run

    return upcycled_run(dense, LAYOUTS["h100"]["e8t2"], TRAINING, spec, data=data)


@on_gpus(LAYOUTS["h100"]["dense"].gpus, "h100")
def llama32_3b_dense_ct_pretrain_64gpu_h100_bf16_config(dense: str = PARENT, data: Optional[str] = None) -> Any:
    """Make the dense baseline in Megatron-Bridge, on 64 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import dense_run

    return dense_run(dense, LAYOUTS["h100"]["dense"], TRAINING, data=data)


#: Trainings of a chain in Megatron-Bridge: the upcycled model and its dense baseline.
BRIDGE_CHAINS = {
    "e8t2": (llama32_3b_e8t2_pretrain_64gpu_h100_bf16_config, llama32_3b_dense_ct_pretrain_64gpu_h100_bf16_config),
}
