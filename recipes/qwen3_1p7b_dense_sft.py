"""Qwen3 1.7B, tuned on conversations as a dense model: what `qwen3_1p7b_e8t2_sft` is compared with."""

from nemo_upcycle.recipes import qwen3_1p7b_dense_ct
from nemo_upcycle.recipes.tuning import ONE_CARD, tuning_recipe


NAME = "qwen3_1p7b_dense_sft"
SCHEDULE = ONE_CARD
finetune_recipe = tuning_recipe(NAME, qwen3_1p7b_dense_ct.pretrain_recipe, **SCHEDULE)
