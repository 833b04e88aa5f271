"""Llama 3 8B and 70B, Llama 3.1 8B and Qwen3 8B upcycled to 8 experts, top-2, on racks of GB200 (NVL72).

The trainings for B200 with HybridEP, which Bridge's own recipes of Qwen3-MoE for GB200 have, and fast runs in MXFP8.
Layouts are the planner's (`nemo-upcycle plan --gpu gb200`); those of fast runs hold all tokens on two experts,
too. No GB200 has run them.
"""

from __future__ import annotations

from nemo_upcycle.trainers.bridge.recipes.upcycled.h100.llama3 import LLAMA3_8B, LLAMA3_70B, LLAMA31_8B
from nemo_upcycle.trainers.bridge.recipes.upcycled.h100.qwen3 import QWEN3_8B
from nemo_upcycle.trainers.bridge.recipes.upcycled.runs import NVL72, dense_run, hybridep_run, mxfp8_run
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


__all__ = [
    "llama3_8b_dense_ct_pretrain_64gpu_gb200_bf16_config",
    "llama3_8b_e8t2_pretrain_64gpu_gb200_bf16_config",
    "llama3_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config",
    "llama3_70b_dense_ct_pretrain_256gpu_gb200_bf16_config",
    "llama3_70b_e8t2_pretrain_256gpu_gb200_bf16_config",
    "llama3_70b_e8t2_pretrain_256gpu_gb200_fp8mx_config",
    "llama31_8b_dense_ct_pretrain_64gpu_gb200_bf16_config",
    "llama31_8b_e8t2_pretrain_64gpu_gb200_bf16_config",
    "llama31_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config",
    "qwen3_8b_dense_ct_pretrain_64gpu_gb200_bf16_config",
    "qwen3_8b_e8t2_pretrain_64gpu_gb200_bf16_config",
    "qwen3_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config",
]


def llama3_8b_e8t2_pretrain_64gpu_gb200_bf16_config() -> UpcyclingConfig:
    """Return the paper's training of Llama 3 8B: EP8 alone."""
    return hybridep_run(LLAMA3_8B, nvlink_gpus=NVL72)


def llama3_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config() -> UpcyclingConfig:
    """Return the fast run of Llama 3 8B in MXFP8: CP2 EP8."""
    return mxfp8_run(LLAMA3_8B, cp=2)


def llama3_8b_dense_ct_pretrain_64gpu_gb200_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3 8B, by data parallelism alone."""
    return dense_run(LLAMA3_8B)


def llama31_8b_e8t2_pretrain_64gpu_gb200_bf16_config() -> UpcyclingConfig:
    """Return the training of Llama 3.1 8B, whose RoPE scaling is kept: EP8 alone."""
    return hybridep_run(LLAMA31_8B, nvlink_gpus=NVL72)


def llama31_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config() -> UpcyclingConfig:
    """Return the fast run of Llama 3.1 8B in MXFP8: CP2 EP8."""
    return mxfp8_run(LLAMA31_8B, cp=2)


def llama31_8b_dense_ct_pretrain_64gpu_gb200_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3.1 8B, by data parallelism alone."""
    return dense_run(LLAMA31_8B)


def llama3_70b_e8t2_pretrain_256gpu_gb200_bf16_config() -> UpcyclingConfig:
    """Return the training of Llama 3 70B: TP2 PP8 VPP10 EP8."""
    return hybridep_run(LLAMA3_70B, nvlink_gpus=NVL72, tp=2, pp=8, vp=10)


def llama3_70b_e8t2_pretrain_256gpu_gb200_fp8mx_config() -> UpcyclingConfig:
    """Return the fast run of Llama 3 70B in MXFP8: TP4 CP2 PP8 VPP10 EP8."""
    return mxfp8_run(LLAMA3_70B, tp=4, cp=2, pp=8, vp=10)


def llama3_70b_dense_ct_pretrain_256gpu_gb200_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3 70B: TP2 PP8 VPP10."""
    return dense_run(LLAMA3_70B, tp=2, pp=8, vp=10)


def qwen3_8b_e8t2_pretrain_64gpu_gb200_bf16_config() -> UpcyclingConfig:
    """Return the training of Qwen3 8B: EP8 alone."""
    return hybridep_run(QWEN3_8B, nvlink_gpus=NVL72)


def qwen3_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config() -> UpcyclingConfig:
    """Return the fast run of Qwen3 8B in MXFP8: CP2 EP8."""
    return mxfp8_run(QWEN3_8B, cp=2)


def qwen3_8b_dense_ct_pretrain_64gpu_gb200_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Qwen3 8B, by data parallelism alone."""
    return dense_run(QWEN3_8B)
