"""Llama 3 8B upcycled to 8 experts with top-2 routing, and its dense baseline.

The upcycled model has 47.49B parameters (13.67B active). Both models train on 100B tokens, as in arXiv 2412.09952.

These are the main run of the paper and the fast run of its Table 2. The paper states:

- main run: 512 H100, TP2 EP8 PP4 VPP8, capacity factor 4 (which drops nothing with 8 experts and top-2), a
  Mixtral-type router, experts as plain copies, 100B tokens, the learning rate and its schedule;
- fast run: TP1 CP2 EP8 PP4 VPP8 with capacity factor 1, 46.8 % MFU on 128 H100 (462.8 TFLOP/s per GPU in BF16,
  counting full attention);
- dense run: 27B tokens and 52.4 % MFU, but no layout, so NeMo's own layout is used here.

The paper prints 34.4B and 11.8B parameters, which omit one of the three matrices of every extra expert. Its FLOPs
(7.5e14 for a sequence of 8192) fit the true sizes. Chosen here:

- sequences of 8192, because the paper's FLOPs fit no other length; 512 per step, Adam and clipping as in NeMo;
- no context parallelism, because the paper names none for the main run;
- load-balancing loss 0.01 and no z-loss, as in NeMo's Mixtral and as He et al. found best; router std 0.02;
- MoE layers recomputed in the first 500 steps, because routers start unbalanced and the paper advises it;
- communication overlapped, because eight virtual stages instead of one send eight times as many messages.

A checkpoint with optimizer states takes about 665 GB. The last two checkpoints are kept while one more is written.
"""

from collections.abc import Callable
from typing import Any, Optional

from nemo_upcycle.planning.recipe_table import Run, Schedule, Tuning, on_gpus
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.recipe_arguments import with_help, with_overrides


TITLE = "Llama 3 8B"
PARENT = "hf://meta-llama/Meta-Llama-3-8B"
SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: Token slots per expert, as a multiple of the balanced share. With 8 experts and top-2, a factor of 4 drops nothing.
CAPACITY_FACTOR = 4.0
#: GPU model -> training -> number of GPUs and layout. Experts are spread over eight ranks (EP8) and never cut.
#: By the planner's estimate, the H100 layouts fit 80 GB with room to spare. The planner chose the other layouts, and
#: none of them has run on Blackwell.
#: `fast`: capacity factor 1 with padding (on GB200 no capacity limit). NeMo uses only the layout's TP and CP.
LAYOUTS = {
    "h100": {
        "e8t2": Run(gpus=512, tp=2, pp=4, vp=8),
        "fast": Run(gpus=128, cp=2, pp=4, vp=8, precision="fp8cs"),
        "dense": Run(gpus=512, cp=2),
    },
    "b200": {
        "e8t2": Run(gpus=64),
        "dense": Run(gpus=64),
    },
    "gb200": {
        "e8t2": Run(gpus=64),
        "fast": Run(gpus=64, cp=2, precision="fp8mx"),
        "dense": Run(gpus=64),
    },
}
TRAINING = Schedule(seq_length=8192, global_batch=512, steps=23_842, lr=3e-5, min_lr=3e-7, warmup_steps=100)
#: 128 packs per step, at a learning rate below the peak of pretraining. For comparison, MoEsturizer (OpenReview
#: HDZ2GBwrWo) tunes 8B models on 150,000 conversations.
#: The parent is the Instruct model, because the base model has no chat template.
TUNING = Tuning(
    parent="hf://meta-llama/Meta-Llama-3-8B-Instruct",
    schedule=Schedule(seq_length=4096, global_batch=128, steps=1_000, lr=1e-5, min_lr=1e-6, warmup_steps=50),
    gpus=64,
)
DATA, EVALUATION = "redpajama_v2_academic_7_3", "paper"


def dense_model() -> Any:
    """Make the dense model in NeMo."""
    from nemo.collections.llm.recipes.llama3_8b import model

    return model()


def moe_model() -> Any:
    """Make the upcycled model in NeMo."""
    from nemo_upcycle.trainers.nemo.recipe_parts import with_experts

    return with_experts(dense_model(), SPEC, capacity_factor=CAPACITY_FACTOR)


@with_overrides
def e8t2(
    dir: Optional[str] = None,
    name: str = "llama3_8b_e8t2",
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = PARENT,
    data: Optional[str] = None,
    fn: Optional[Callable] = None,
) -> Any:
    """Upcycle Llama 3 8B online and continue training in NeMo, as in arXiv 2412.09952."""
    from nemo.collections.llm.recipes import llama3_8b

    from nemo_upcycle.trainers.nemo.paper_recipe import fast_run, upcycled_recipe

    named = {"dir": dir, "name": name, "num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node, "fn": fn}
    recipe = upcycled_recipe(llama3_8b, moe_model(), LAYOUTS["h100"]["e8t2"], TRAINING, SPEC, dense, data, **named)
    return fast_run(recipe, LAYOUTS["h100"]["fast"]) if performance_mode else recipe


@with_help
def dense_ct(
    dir: Optional[str] = None,
    name: str = "llama3_8b_dense_ct",
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = PARENT,
    data: Optional[str] = None,
    fn: Optional[Callable] = None,
) -> Any:
    """Continue training dense Llama 3 8B in NeMo, as the baseline of `llama3_8b_e8t2` on the same data."""
    from nemo.collections.llm.recipes import llama3_8b

    from nemo_upcycle.trainers.nemo.paper_recipe import dense_recipe

    named = {"dir": dir, "name": name, "num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node, "fn": fn}
    named["performance_mode"] = performance_mode
    return dense_recipe(llama3_8b, dense_model(), LAYOUTS["h100"]["dense"], TRAINING, dense, data, **named)


@with_help
def e8t2_sft(
    dir: Optional[str] = None,
    name: str = "llama3_8b_e8t2_sft",
    num_nodes: int = 8,
    num_gpus_per_node: int = 8,
    expert_parallelism: Optional[int] = None,
    dense: str = TUNING.parent,
    data: Optional[str] = None,
    start: Optional[str] = None,
    peft_scheme: Optional[str] = None,
) -> Any:
    """Upcycle Llama 3 8B online and tune it on conversations in NeMo, with a loss only on the answers."""
    from nemo_upcycle.trainers.nemo.tuning_recipe import is_lora, tuned

    experts = expert_parallelism or (1 if is_lora(peft_scheme) else None)
    named = {"num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node, "dense": dense}
    recipe = e8t2(dir, name, expert_parallelism=experts, **named)
    return tuned(recipe, TUNING, data=data, start=start, peft_scheme=peft_scheme)


@with_help
def dense_sft(
    dir: Optional[str] = None,
    name: str = "llama3_8b_dense_sft",
    num_nodes: int = 8,
    num_gpus_per_node: int = 8,
    dense: str = TUNING.parent,
    data: Optional[str] = None,
    start: Optional[str] = None,
    peft_scheme: Optional[str] = None,
) -> Any:
    """Tune dense Llama 3 8B on conversations in NeMo, as the baseline of `llama3_8b_e8t2_sft`."""
    from nemo_upcycle.trainers.nemo.tuning_recipe import tuned

    recipe = dense_ct(dir, name, num_nodes, num_gpus_per_node, dense=dense)
    return tuned(recipe, TUNING, data=data, start=start, peft_scheme=peft_scheme)


@on_gpus(LAYOUTS["h100"]["e8t2"].gpus, "h100")
def llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config(
    dense: str = PARENT, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the upcycled model's training in Megatron-Bridge, on 512 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import upcycled_run

    return upcycled_run(dense, LAYOUTS["h100"]["e8t2"], TRAINING, spec, data=data)


@on_gpus(LAYOUTS["h100"]["fast"].gpus, "h100")
def llama3_8b_e8t2_pretrain_128gpu_h100_fp8cs_config(
    dense: str = PARENT, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the fast run in Megatron-Bridge, on 128 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import fast_run

    return fast_run(dense, LAYOUTS["h100"]["fast"], TRAINING, spec, data=data)


@on_gpus(LAYOUTS["h100"]["dense"].gpus, "h100")
def llama3_8b_dense_ct_pretrain_512gpu_h100_bf16_config(dense: str = PARENT, data: Optional[str] = None) -> Any:
    """Make the dense baseline in Megatron-Bridge, on 512 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import dense_run

    return dense_run(dense, LAYOUTS["h100"]["dense"], TRAINING, data=data)


@on_gpus(LAYOUTS["b200"]["e8t2"].gpus, "b200")
def llama3_8b_e8t2_pretrain_64gpu_b200_bf16_config(
    dense: str = PARENT, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the upcycled model's training in Megatron-Bridge, on 64 B200."""
    from nemo_upcycle.trainers.bridge.recipes.runs import upcycled_run

    return upcycled_run(dense, LAYOUTS["b200"]["e8t2"], TRAINING, spec, data=data)


@on_gpus(LAYOUTS["b200"]["dense"].gpus, "b200")
def llama3_8b_dense_ct_pretrain_64gpu_b200_bf16_config(dense: str = PARENT, data: Optional[str] = None) -> Any:
    """Make the dense baseline in Megatron-Bridge, on 64 B200."""
    from nemo_upcycle.trainers.bridge.recipes.runs import dense_run

    return dense_run(dense, LAYOUTS["b200"]["dense"], TRAINING, data=data)


@on_gpus(LAYOUTS["gb200"]["e8t2"].gpus, "gb200")
def llama3_8b_e8t2_pretrain_64gpu_gb200_bf16_config(
    dense: str = PARENT, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the upcycled model's training in Megatron-Bridge, on 64 GB200."""
    from nemo_upcycle.trainers.bridge.recipes.runs import NVL72, hybridep_run

    return hybridep_run(dense, LAYOUTS["gb200"]["e8t2"], TRAINING, spec, nvlink_gpus=NVL72, data=data)


@on_gpus(LAYOUTS["gb200"]["fast"].gpus, "gb200")
def llama3_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config(
    dense: str = PARENT, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the fast run in Megatron-Bridge, on 64 GB200."""
    from nemo_upcycle.trainers.bridge.recipes.runs import mxfp8_run

    return mxfp8_run(dense, LAYOUTS["gb200"]["fast"], TRAINING, spec, data=data)


@on_gpus(LAYOUTS["gb200"]["dense"].gpus, "gb200")
def llama3_8b_dense_ct_pretrain_64gpu_gb200_bf16_config(dense: str = PARENT, data: Optional[str] = None) -> Any:
    """Make the dense baseline in Megatron-Bridge, on 64 GB200."""
    from nemo_upcycle.trainers.bridge.recipes.runs import dense_run

    return dense_run(dense, LAYOUTS["gb200"]["dense"], TRAINING, data=data)


@on_gpus(TUNING.gpus, "h100", tunes=True)
def llama3_8b_e8t2_sft_64gpu_h100_bf16_config(
    dense: str = TUNING.parent, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the tuning of the upcycled model on conversations in Megatron-Bridge, on 64 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import tuned, upcycled_run

    return tuned(upcycled_run(dense, LAYOUTS["h100"]["e8t2"], TRAINING, spec), TUNING, data)


@on_gpus(TUNING.gpus, "h100", tunes=True)
def llama3_8b_dense_sft_64gpu_h100_bf16_config(dense: str = TUNING.parent, data: Optional[str] = None) -> Any:
    """Make the tuning of the dense model on conversations in Megatron-Bridge, on 64 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import dense_run, tuned

    return tuned(dense_run(dense, Run(64), TRAINING), TUNING, data)


#: Trainings of a chain in Megatron-Bridge: the upcycled model and its dense baseline.
BRIDGE_CHAINS = {
    "e8t2": (llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config, llama3_8b_dense_ct_pretrain_512gpu_h100_bf16_config),
    "e8t2_sft": (llama3_8b_e8t2_sft_64gpu_h100_bf16_config, llama3_8b_dense_sft_64gpu_h100_bf16_config),
}
