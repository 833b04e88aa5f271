"""Qwen3 8B upcycled to 8 experts, top-2, on B200; the layouts are the planner's, as `llama3.py` says."""

from __future__ import annotations

from nemo_upcycle.trainers.bridge.recipes.upcycled.h100.qwen3 import QWEN3_8B
from nemo_upcycle.trainers.bridge.recipes.upcycled.runs import dense_run, upcycled_run
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


def qwen3_8b_e8t2_pretrain_64gpu_b200_bf16_config() -> UpcyclingConfig:
    """Return the training of Qwen3 8B: EP8 alone."""
    return upcycled_run(QWEN3_8B)


def qwen3_8b_dense_ct_pretrain_64gpu_b200_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Qwen3 8B, by data parallelism alone."""
    return dense_run(QWEN3_8B)
