"""Qwen3 8B, tuned on conversations as a dense model: what `qwen3_8b_e8t2_sft` is compared with."""

from nemo_upcycle.recipes import qwen3_8b_dense_ct
from nemo_upcycle.recipes.tuning import TUNING, tuning_recipe


NAME = "qwen3_8b_dense_sft"
finetune_recipe = tuning_recipe(NAME, qwen3_8b_dense_ct.pretrain_recipe, **TUNING)
