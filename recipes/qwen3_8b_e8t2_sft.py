"""Qwen3 8B upcycled to 8 experts, top-2, and tuned on conversations: 64 H100, layout of `qwen3_8b_e8t2`."""

import inspect

from nemo_upcycle.recipes import qwen3_8b_dense_sft, qwen3_8b_e8t2
from nemo_upcycle.recipes.tuning import TUNING, tuning_chain, tuning_recipe


NAME = "qwen3_8b_e8t2_sft"
finetune_recipe = tuning_recipe(NAME, qwen3_8b_e8t2.pretrain_recipe, **TUNING)
pipeline_recipe = tuning_chain(
    NAME,
    finetune_recipe,
    qwen3_8b_dense_sft.finetune_recipe,
    dense=inspect.signature(finetune_recipe).parameters["dense"].default,
)
