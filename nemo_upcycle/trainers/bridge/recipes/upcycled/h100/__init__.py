"""Recipes of upcycled models on H100."""

from nemo_upcycle.trainers.bridge.recipes.upcycled.h100.llama3 import (
    llama3_8b_dense_ct_pretrain_512gpu_h100_bf16_config,
    llama3_8b_e8t2_pretrain_128gpu_h100_fp8cs_config,
    llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config,
    llama3_70b_dense_ct_pretrain_512gpu_h100_bf16_config,
    llama3_70b_e8t2_pretrain_512gpu_h100_bf16_config,
    llama3_70b_e8t2_pretrain_512gpu_h100_fp8sc_config,
    llama31_8b_dense_ct_pretrain_512gpu_h100_bf16_config,
    llama31_8b_e8t2_pretrain_128gpu_h100_fp8cs_config,
    llama31_8b_e8t2_pretrain_512gpu_h100_bf16_config,
)
from nemo_upcycle.trainers.bridge.recipes.upcycled.h100.qwen3 import (
    qwen3_8b_dense_ct_pretrain_512gpu_h100_bf16_config,
    qwen3_8b_e8t2_pretrain_128gpu_h100_fp8sc_config,
    qwen3_8b_e8t2_pretrain_512gpu_h100_bf16_config,
    qwen3_8b_e8t2_pretrain_512gpu_h100_bf16_hybridep_config,
    qwen3_600m_dense_ct_pretrain_1gpu_h100_bf16_config,
    qwen3_600m_e8t2_pretrain_1gpu_h100_bf16_config,
)
from nemo_upcycle.trainers.bridge.recipes.upcycled.h100.smollm2 import (
    smollm2_135m_dense_ct_pretrain_1gpu_h100_bf16_config,
    smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config,
)


__all__ = [
    "llama3_8b_dense_ct_pretrain_512gpu_h100_bf16_config",
    "llama3_8b_e8t2_pretrain_128gpu_h100_fp8cs_config",
    "llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config",
    "llama3_70b_dense_ct_pretrain_512gpu_h100_bf16_config",
    "llama3_70b_e8t2_pretrain_512gpu_h100_bf16_config",
    "llama3_70b_e8t2_pretrain_512gpu_h100_fp8sc_config",
    "llama31_8b_dense_ct_pretrain_512gpu_h100_bf16_config",
    "llama31_8b_e8t2_pretrain_128gpu_h100_fp8cs_config",
    "llama31_8b_e8t2_pretrain_512gpu_h100_bf16_config",
    "qwen3_8b_dense_ct_pretrain_512gpu_h100_bf16_config",
    "qwen3_8b_e8t2_pretrain_128gpu_h100_fp8sc_config",
    "qwen3_8b_e8t2_pretrain_512gpu_h100_bf16_config",
    "qwen3_8b_e8t2_pretrain_512gpu_h100_bf16_hybridep_config",
    "qwen3_600m_dense_ct_pretrain_1gpu_h100_bf16_config",
    "qwen3_600m_e8t2_pretrain_1gpu_h100_bf16_config",
    "smollm2_135m_dense_ct_pretrain_1gpu_h100_bf16_config",
    "smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config",
]
