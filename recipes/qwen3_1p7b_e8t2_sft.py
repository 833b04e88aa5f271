"""Qwen3 1.7B upcycled to 8 experts, top-2, and tuned on conversations by LoRA: on one GPU of 80 GB."""

import inspect

from nemo_upcycle.recipes import qwen3_1p7b_dense_sft, qwen3_1p7b_e8t2
from nemo_upcycle.recipes.tuning import tuning_chain, tuning_recipe


NAME = "qwen3_1p7b_e8t2_sft"
finetune_recipe = tuning_recipe(NAME, qwen3_1p7b_e8t2.pretrain_recipe, **qwen3_1p7b_dense_sft.SCHEDULE)
pipeline_recipe = tuning_chain(
    NAME,
    finetune_recipe,
    qwen3_1p7b_dense_sft.finetune_recipe,
    dense=inspect.signature(finetune_recipe).parameters["dense"].default,
    num_nodes=1,
    num_gpus_per_node=1,
    expert_parallelism=1,
)
