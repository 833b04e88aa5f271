"""Llama 3.2 1B upcycled to 8 experts, top-2, and tuned on conversations by LoRA: on one GPU of 24 GB."""

from nemo_upcycle.recipes import llama32_1b_dense_sft, llama32_1b_e8t2
from nemo_upcycle.recipes.tuning import tuning_chain, tuning_recipe


NAME = "llama32_1b_e8t2_sft"
finetune_recipe = tuning_recipe(
    NAME, llama32_1b_e8t2.pretrain_recipe, dense=llama32_1b_dense_sft.INSTRUCT, **llama32_1b_dense_sft.SCHEDULE
)
pipeline_recipe = tuning_chain(
    NAME,
    finetune_recipe,
    llama32_1b_dense_sft.finetune_recipe,
    dense=llama32_1b_dense_sft.INSTRUCT,
    num_nodes=1,
    num_gpus_per_node=1,
    expert_parallelism=1,
)
