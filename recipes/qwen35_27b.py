"""Qwen3.5 27B upcycled to 8 experts with top-2 routing, and its dense baseline.

The upcycled model has 146.69B parameters (44.01B active). Both models train on 100B tokens, as in arXiv 2412.09952.

Qwen3.5 trains only in Megatron-Bridge, because the Megatron-Core of NeMo 2.7 has no gated delta nets. The
recipe trains only the text model, with the sizes of the published config.json. The planner chose the layouts.
"""

from typing import Any, Optional

from nemo_upcycle.planning.recipe_table import Run, Schedule, on_gpus
from nemo_upcycle.spec import UpcycleSpec


TITLE = "Qwen3.5 27B"
PARENT = "hf://Qwen/Qwen3.5-27B"
SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: Token slots per expert, as a multiple of the balanced share. With 8 experts and top-2, a factor of 4 drops nothing.
CAPACITY_FACTOR = 4.0
#: GPU model -> training -> number of GPUs and layout. Experts are spread over eight ranks (EP8) and never cut.
#: By the planner's estimate, the layouts fit an H100's 80 GB with room to spare.
LAYOUTS = {
    "h100": {
        "e8t2": Run(gpus=512, tp=4, cp=2, pp=4, vp=8),
        "dense": Run(gpus=512, tp=4, pp=2, vp=16),
    },
}
TRAINING = Schedule(seq_length=8192, global_batch=512, steps=23_842, lr=3e-5, min_lr=3e-7, warmup_steps=100)
DATA, EVALUATION = "redpajama_v2_academic_7_3", "paper"


@on_gpus(LAYOUTS["h100"]["e8t2"].gpus, "h100")
def qwen35_27b_e8t2_pretrain_512gpu_h100_bf16_config(
    dense: str = PARENT, spec: UpcycleSpec = SPEC, data: Optional[str] = None
) -> Any:
    """Make the upcycled model's training in Megatron-Bridge, on 512 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import upcycled_run

    return upcycled_run(dense, LAYOUTS["h100"]["e8t2"], TRAINING, spec, data=data)


@on_gpus(LAYOUTS["h100"]["dense"].gpus, "h100")
def qwen35_27b_dense_ct_pretrain_512gpu_h100_bf16_config(dense: str = PARENT, data: Optional[str] = None) -> Any:
    """Make the dense baseline in Megatron-Bridge, on 512 H100."""
    from nemo_upcycle.trainers.bridge.recipes.runs import dense_run

    return dense_run(dense, LAYOUTS["h100"]["dense"], TRAINING, data=data)


#: Trainings of a chain in Megatron-Bridge: the upcycled model and its dense baseline.
BRIDGE_CHAINS = {
    "e8t2": (qwen35_27b_e8t2_pretrain_512gpu_h100_bf16_config, qwen35_27b_dense_ct_pretrain_512gpu_h100_bf16_config),
}
