"""Llama 3 8B, tuned on conversations as a dense model: what `llama3_8b_e8t2_sft` is compared with."""

from nemo_upcycle.recipes import llama3_8b_dense_ct
from nemo_upcycle.recipes.tuning import TUNING, tuning_recipe


NAME = "llama3_8b_dense_sft"
#: The base model's tokenizer has no chat template.
INSTRUCT = "hf://meta-llama/Meta-Llama-3-8B-Instruct"
finetune_recipe = tuning_recipe(NAME, llama3_8b_dense_ct.pretrain_recipe, dense=INSTRUCT, **TUNING)
