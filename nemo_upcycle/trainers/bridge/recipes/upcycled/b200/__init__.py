"""Recipes of upcycled models on B200."""

from nemo_upcycle.trainers.bridge.recipes.upcycled.b200.llama3 import (
    llama3_8b_dense_ct_pretrain_64gpu_b200_bf16_config,
    llama3_8b_e8t2_pretrain_64gpu_b200_bf16_config,
    llama3_70b_dense_ct_pretrain_256gpu_b200_bf16_config,
    llama3_70b_e8t2_pretrain_256gpu_b200_bf16_config,
    llama31_8b_dense_ct_pretrain_64gpu_b200_bf16_config,
    llama31_8b_e8t2_pretrain_64gpu_b200_bf16_config,
)
from nemo_upcycle.trainers.bridge.recipes.upcycled.b200.qwen3 import (
    qwen3_8b_dense_ct_pretrain_64gpu_b200_bf16_config,
    qwen3_8b_e8t2_pretrain_64gpu_b200_bf16_config,
)


__all__ = [
    "llama3_8b_dense_ct_pretrain_64gpu_b200_bf16_config",
    "llama3_8b_e8t2_pretrain_64gpu_b200_bf16_config",
    "llama3_70b_dense_ct_pretrain_256gpu_b200_bf16_config",
    "llama3_70b_e8t2_pretrain_256gpu_b200_bf16_config",
    "llama31_8b_dense_ct_pretrain_64gpu_b200_bf16_config",
    "llama31_8b_e8t2_pretrain_64gpu_b200_bf16_config",
    "qwen3_8b_dense_ct_pretrain_64gpu_b200_bf16_config",
    "qwen3_8b_e8t2_pretrain_64gpu_b200_bf16_config",
]
