"""Qwen3-0.6B, tuned on conversations as a dense model: what `qwen3_600m_e8t2_sft` is compared with."""

from nemo_upcycle.recipes import qwen3_600m_dense_ct
from nemo_upcycle.recipes.tuning import tuning_recipe


NAME = "qwen3_600m_dense_sft"
#: 32M tokens, a fifth of MoEsturizer's 150,000 conversations (OpenReview HDZ2GBwrWo), which one card tuned on.
SCHEDULE = {"seq_length": 4096, "global_batch_size": 16, "max_steps": 500, "lr": 1e-5, "warmup_steps": 25}
finetune_recipe = tuning_recipe(NAME, qwen3_600m_dense_ct.pretrain_recipe, **SCHEDULE)
