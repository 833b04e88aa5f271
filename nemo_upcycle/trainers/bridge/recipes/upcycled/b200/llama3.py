"""Llama 3 8B and 70B and Llama 3.1 8B upcycled to 8 experts, top-2, on B200: the trainings for H100 on fewer GPUs.

The layouts are the planner's (`nemo-upcycle plan --gpu b200`), of the fast ones; no B200 has run them.
"""

from __future__ import annotations

from nemo_upcycle.trainers.bridge.recipes.upcycled.h100.llama3 import LLAMA3_8B, LLAMA3_70B, LLAMA31_8B
from nemo_upcycle.trainers.bridge.recipes.upcycled.runs import dense_run, upcycled_run
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


def llama3_8b_e8t2_pretrain_64gpu_b200_bf16_config() -> UpcyclingConfig:
    """Return the paper's training of Llama 3 8B: EP8 alone."""
    return upcycled_run(LLAMA3_8B)


def llama3_8b_dense_ct_pretrain_64gpu_b200_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3 8B, by data parallelism alone."""
    return dense_run(LLAMA3_8B)


def llama31_8b_e8t2_pretrain_64gpu_b200_bf16_config() -> UpcyclingConfig:
    """Return the training of Llama 3.1 8B, whose RoPE scaling is kept: EP8 alone."""
    return upcycled_run(LLAMA31_8B)


def llama31_8b_dense_ct_pretrain_64gpu_b200_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3.1 8B, by data parallelism alone."""
    return dense_run(LLAMA31_8B)


def llama3_70b_e8t2_pretrain_256gpu_b200_bf16_config() -> UpcyclingConfig:
    """Return the training of Llama 3 70B: TP2 PP8 VPP10 EP8."""
    return upcycled_run(LLAMA3_70B, tp=2, pp=8, vp=10)


def llama3_70b_dense_ct_pretrain_256gpu_b200_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3 70B: TP2 PP8 VPP10."""
    return dense_run(LLAMA3_70B, tp=2, pp=8, vp=10)
