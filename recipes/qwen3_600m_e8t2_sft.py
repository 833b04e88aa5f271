"""Qwen3-0.6B upcycled to 8 experts, top-2, and tuned on conversations: on one GPU of 80 GB, without parallelism."""

from nemo_upcycle.recipes import qwen3_600m_dense_ct, qwen3_600m_dense_sft, qwen3_600m_e8t2
from nemo_upcycle.recipes.tuning import tuning_chain, tuning_recipe


NAME = "qwen3_600m_e8t2_sft"
finetune_recipe = tuning_recipe(NAME, qwen3_600m_e8t2.pretrain_recipe, **qwen3_600m_dense_sft.SCHEDULE)
pipeline_recipe = tuning_chain(
    NAME, finetune_recipe, qwen3_600m_dense_sft.finetune_recipe, dense=qwen3_600m_dense_ct.DENSE
)
