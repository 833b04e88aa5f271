"""Qwen3-0.6B upcycled to 8 experts with top-2 routing, and its dense baseline.

The upcycled model has 2.45B parameters (0.86B active). Both models train for a few steps, to show that a chain works.
"""

from collections.abc import Callable
from typing import Any, Optional

from nemo_upcycle.planning.recipe_table import Run, Schedule, Tuning, on_gpus
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.recipe_arguments import with_help


TITLE = "Qwen3-0.6B"
PARENT = "hf://Qwen/Qwen3-0.6B-Base"
SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: Token slots per expert, as a multiple of the balanced share; None means no limit.
CAPACITY_FACTOR = None
#: GPU model -> training -> number of GPUs and layout.
LAYOUTS = {
    "h100": {
        "e8t2": Run(gpus=1),
        "dense": Run(gpus=1),
    },
}
#: These few steps need only minutes on two CPU cores. Small models tolerate a higher learning rate than the paper's
#: 3e-5, see docs/schedules.md.
TRAINING = Schedule(seq_length=512, global_batch=2, steps=6, lr=1e-4, min_lr=1e-5, warmup_steps=2)
#: The tuning on one card sees 32M tokens.
TUNING = Tuning(
    parent=PARENT,
    schedule=Schedule(seq_length=4096, global_batch=16, steps=500, lr=1e-5, min_lr=1e-6, warmup_steps=25),
    gpus=1,
)
DATA, EVALUATION = "sotu", "demo"


def dense_model() -> Any:
    """Make the dense model in NeMo."""
    from nemo.collections.llm.recipes.qwen3_600m import model

    from nemo_upcycle.trainers.nemo.recipe_parts import change_model

    return change_model(
        model(),
        seq_length=TRAINING.seq_length,
        recompute_granularity="selective",  # unfused attention scores are a third of the activations
    )


def moe_model() -> Any:
    """Make the upcycled model in NeMo."""
    from nemo_upcycle.trainers.nemo.recipe_parts import change_model
    from nemo_upcycle.trainers.nemo.upcycled import moe_settings

    return change_model(dense_model(), **moe_settings(SPEC))


@with_help
def e8t2(
    dir: Optional[str] = None,
    name: str = "qwen3_600m_e8t2",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    expert_parallelism: int = 1,
    dense: str = PARENT,
    data: Optional[str] = None,
    fn: Optional[Callable] = None,
) -> Any:
    """Upcycle Qwen3-0.6B online and train it for a few steps in NeMo."""
    from nemo_upcycle.trainers.nemo.few_steps_recipe import few_steps_recipe

    named = {"dir": dir, "name": name, "num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node, "fn": fn}
    return few_steps_recipe(
        moe_model(), TRAINING, dense, data, spec=SPEC, expert_parallelism=expert_parallelism, **named
    )


@with_help
def dense_ct(
    dir: Optional[str] = None,
    name: str = "qwen3_600m_dense_ct",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    dense: str = PARENT,
    data: Optional[str] = None,
    fn: Optional[Callable] = None,
) -> Any:
    """Train dense Qwen3-0.6B for a few steps in NeMo, as the baseline of `qwen3_600m_e8t2`."""
    from nemo_upcycle.trainers.nemo.few_steps_recipe import few_steps_recipe

    named = {"dir": dir, "name": name, "num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node, "fn": fn}
    return few_steps_recipe(dense_model(), TRAINING, dense, data, **named)


@with_help
def e8t2_sft(
    dir: Optional[str] = None,
    name: str = "qwen3_600m_e8t2_sft",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    expert_parallelism: Optional[int] = None,
    dense: str = TUNING.parent,
    data: Optional[str] = None,
    start: Optional[str] = None,
    peft_scheme: Optional[str] = None,
) -> Any:
    """Upcycle Qwen3-0.6B online and tune it on conversations in NeMo, with a loss only on the answers."""
    from nemo_upcycle.trainers.nemo.tuning_recipe import tuned

    recipe = e8t2(dir, name, num_nodes, num_gpus_per_node, expert_parallelism or 1, dense)
    return tuned(recipe, TUNING, data=data, start=start, peft_scheme=peft_scheme)


@with_help
def dense_sft(
    dir: Optional[str] = None,
    name: str = "qwen3_600m_dense_sft",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    dense: str = TUNING.parent,
    data: Optional[str] = None,
    start: Optional[str] = None,
    peft_scheme: Optional[str] = None,
) -> Any:
    """Tune dense Qwen3-0.6B on conversations in NeMo, as the baseline of `qwen3_600m_e8t2_sft`."""
    from nemo_upcycle.trainers.nemo.tuning_recipe import tuned

    recipe = dense_ct(dir, name, num_nodes, num_gpus_per_node, dense=dense)
    return tuned(recipe, TUNING, data=data, start=start, peft_scheme=peft_scheme)


@on_gpus(LAYOUTS["h100"]["e8t2"].gpus, "h100")
def qwen3_600m_e8t2_pretrain_1gpu_h100_bf16_config(
    dense: str = PARENT, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the upcycled model's training in Megatron-Bridge, on 1 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import small_run

    return small_run(dense, TRAINING, spec, data=data)


@on_gpus(LAYOUTS["h100"]["dense"].gpus, "h100")
def qwen3_600m_dense_ct_pretrain_1gpu_h100_bf16_config(dense: str = PARENT, data: Optional[str] = None) -> Any:
    """Make the dense baseline in Megatron-Bridge, on 1 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import small_run

    return small_run(dense, TRAINING, None, data=data)


@on_gpus(TUNING.gpus, "h100", tunes=True)
def qwen3_600m_e8t2_sft_1gpu_h100_bf16_config(
    dense: str = TUNING.parent, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the tuning of the upcycled model on conversations in Megatron-Bridge, on 1 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import small_run, tuned

    return tuned(small_run(dense, TRAINING, spec), TUNING, data)


@on_gpus(TUNING.gpus, "h100", tunes=True)
def qwen3_600m_dense_sft_1gpu_h100_bf16_config(dense: str = TUNING.parent, data: Optional[str] = None) -> Any:
    """Make the tuning of the dense model on conversations in Megatron-Bridge, on 1 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import small_run, tuned

    return tuned(small_run(dense, TRAINING, None), TUNING, data)


#: Trainings of a chain in Megatron-Bridge: the upcycled model and its dense baseline.
BRIDGE_CHAINS = {
    "e8t2": (qwen3_600m_e8t2_pretrain_1gpu_h100_bf16_config, qwen3_600m_dense_ct_pretrain_1gpu_h100_bf16_config),
    "e8t2_sft": (qwen3_600m_e8t2_sft_1gpu_h100_bf16_config, qwen3_600m_dense_sft_1gpu_h100_bf16_config),
}
