"""Llama 3 8B upcycled to 8 experts, top-2, and tuned on conversations: 64 H100, layout of `llama3_8b_e8t2`."""

from nemo_upcycle.recipes import llama3_8b_dense_sft, llama3_8b_e8t2
from nemo_upcycle.recipes.tuning import TUNING, tuning_chain, tuning_recipe


NAME = "llama3_8b_e8t2_sft"
finetune_recipe = tuning_recipe(NAME, llama3_8b_e8t2.pretrain_recipe, dense=llama3_8b_dense_sft.INSTRUCT, **TUNING)
pipeline_recipe = tuning_chain(
    NAME,
    finetune_recipe,
    llama3_8b_dense_sft.finetune_recipe,
    dense=llama3_8b_dense_sft.INSTRUCT,
)
