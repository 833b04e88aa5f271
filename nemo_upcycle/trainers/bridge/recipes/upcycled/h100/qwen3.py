"""Qwen3 0.6B to 32B upcycled to 8 experts, top-2, on H100; exported as Qwen3-MoE."""

from __future__ import annotations

from nemo_upcycle.trainers.bridge.recipes.upcycled.runs import (
    E8T2,
    dense_run,
    fast_run,
    hybridep_run,
    small_run,
    upcycled_run,
)
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


QWEN3_8B = "hf://Qwen/Qwen3-8B-Base"
QWEN3_600M = "hf://Qwen/Qwen3-0.6B-Base"
QWEN3_1P7B = "hf://Qwen/Qwen3-1.7B-Base"
QWEN3_4B = "hf://Qwen/Qwen3-4B-Base"
QWEN3_14B = "hf://Qwen/Qwen3-14B-Base"
QWEN3_32B = "hf://Qwen/Qwen3-32B"


def qwen3_8b_e8t2_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of Qwen3 8B: TP2 PP4 VPP9 EP8, one of its 36 layers in each virtual stage."""
    return upcycled_run(QWEN3_8B, tp=2, pp=4, vp=9)


def qwen3_8b_e8t2_pretrain_512gpu_h100_bf16_hybridep_config() -> UpcyclingConfig:
    """Return the same training with HybridEP, which Bridge's own recipes of Qwen3-MoE on H100 have."""
    return hybridep_run(QWEN3_8B, tp=2, pp=4, vp=9)


def qwen3_8b_e8t2_pretrain_128gpu_h100_fp8sc_config() -> UpcyclingConfig:
    """Return the fast run of Qwen3 8B in FP8 with blockwise (subchannel) scaling: CP2 PP4 VPP9 EP8."""
    return fast_run(QWEN3_8B, "bf16_with_fp8_subchannel_scaling_mixed", cp=2, pp=4, vp=9)


def qwen3_8b_dense_ct_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Qwen3 8B: CP2, as Llama 3 8B's, which has the same width."""
    return dense_run(QWEN3_8B, cp=2)


def qwen3_600m_e8t2_pretrain_1gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return a short training of the upcycled Qwen3-0.6B."""
    return small_run(QWEN3_600M, E8T2)


def qwen3_600m_dense_ct_pretrain_1gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return a short training of Qwen3-0.6B as it is, the dense baseline."""
    return small_run(QWEN3_600M, None)


def qwen3_1p7b_e8t2_pretrain_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of Qwen3 1.7B: EP8."""
    return upcycled_run(QWEN3_1P7B)


def qwen3_1p7b_dense_ct_pretrain_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Qwen3 1.7B: CP2."""
    return dense_run(QWEN3_1P7B, cp=2)


def qwen3_4b_e8t2_pretrain_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of Qwen3 4B: TP2 EP8."""
    return upcycled_run(QWEN3_4B, tp=2)


def qwen3_4b_dense_ct_pretrain_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Qwen3 4B: CP2."""
    return dense_run(QWEN3_4B, cp=2)


def qwen3_14b_e8t2_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of Qwen3 14B: TP2 CP2 PP4 VPP10 EP8."""
    return upcycled_run(QWEN3_14B, tp=2, pp=4, vp=10, cp=2)


def qwen3_14b_dense_ct_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Qwen3 14B: TP2 CP2."""
    return dense_run(QWEN3_14B, tp=2, cp=2)


def qwen3_32b_e8t2_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of Qwen3 32B: TP4 CP2 PP8 VPP8 EP8."""
    return upcycled_run(QWEN3_32B, tp=4, pp=8, vp=8, cp=2)


def qwen3_32b_dense_ct_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Qwen3 32B: TP4 PP2 VPP16."""
    return dense_run(QWEN3_32B, tp=4, pp=2, vp=16)
