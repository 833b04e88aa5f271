"""SmolLM2-135M, tuned on conversations as a dense model: what `smollm2_135m_e8t2_sft` is compared with."""

from nemo_upcycle.recipes import smollm2_135m_dense_ct
from nemo_upcycle.recipes.tuning import tuning_recipe


NAME = "smollm2_135m_dense_sft"
#: 8 steps of 2 x 512 tokens: what two CPU cores do in a few minutes.
SCHEDULE = {"seq_length": 512, "global_batch_size": 2, "max_steps": 8, "lr": 1e-5, "warmup_steps": 2}
finetune_recipe = tuning_recipe(NAME, smollm2_135m_dense_ct.pretrain_recipe, **SCHEDULE)
