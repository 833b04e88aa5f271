"""SmolLM2-135M-Instruct upcycled to 8 experts, top-2, and tuned on conversations: the whole chain on a laptop."""

import torch

from nemo_upcycle.recipes import smollm2_135m_dense_ct, smollm2_135m_dense_sft, smollm2_135m_e8t2
from nemo_upcycle.recipes.tuning import tuning_chain, tuning_recipe


NAME = "smollm2_135m_e8t2_sft"
finetune_recipe = tuning_recipe(NAME, smollm2_135m_e8t2.pretrain_recipe, **smollm2_135m_dense_sft.SCHEDULE)
_RANKS = 1 if torch.cuda.device_count() == 1 else 2
pipeline_recipe = tuning_chain(
    NAME,
    finetune_recipe,
    smollm2_135m_dense_sft.finetune_recipe,
    dense=smollm2_135m_dense_ct.DENSE,
    adapt=smollm2_135m_e8t2.fit_laptop,
    num_gpus_per_node=_RANKS,
    expert_parallelism=_RANKS,
)
