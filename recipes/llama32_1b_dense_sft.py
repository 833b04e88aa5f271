"""Llama 3.2 1B, tuned on conversations as a dense model: what `llama32_1b_e8t2_sft` is compared with."""

from nemo_upcycle.recipes import llama32_1b_dense_ct
from nemo_upcycle.recipes.tuning import ONE_CARD, tuning_recipe


NAME = "llama32_1b_dense_sft"
#: The base model's tokenizer has no chat template.
INSTRUCT = "hf://meta-llama/Llama-3.2-1B-Instruct"
SCHEDULE = {**ONE_CARD, "seq_length": 2048, "global_batch_size": 32}
finetune_recipe = tuning_recipe(NAME, llama32_1b_dense_ct.pretrain_recipe, dense=INSTRUCT, **SCHEDULE)
