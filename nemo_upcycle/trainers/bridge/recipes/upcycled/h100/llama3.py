"""Llama 3 8B and 70B, 3.1 8B and 3.2 1B and 3B upcycled to 8 experts, top-2, as in arXiv 2412.09952, on H100."""

from __future__ import annotations

from nemo_upcycle.trainers.bridge.recipes.upcycled.runs import dense_run, fast_run, upcycled_run
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


LLAMA3_8B = "hf://meta-llama/Meta-Llama-3-8B"
LLAMA31_8B = "hf://meta-llama/Llama-3.1-8B"
LLAMA3_70B = "hf://meta-llama/Meta-Llama-3-70B"
LLAMA32_1B = "hf://meta-llama/Llama-3.2-1B"
LLAMA32_3B = "hf://meta-llama/Llama-3.2-3B"
_CURRENT, _BLOCKWISE = "bf16_with_fp8_current_scaling_mixed", "bf16_with_fp8_subchannel_scaling_mixed"


def llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the paper's training of Llama 3 8B: TP2 PP4 VPP8 EP8."""
    return upcycled_run(LLAMA3_8B, tp=2, pp=4, vp=8)


def llama3_8b_e8t2_pretrain_128gpu_h100_fp8cs_config() -> UpcyclingConfig:
    """Return the fast run of Llama 3 8B in FP8 with current scaling: CP2 PP4 VPP8 EP8.

    The paper reports 462.8 TFLOP/s a GPU for this layout in BF16, in NeMo.
    """
    return fast_run(LLAMA3_8B, _CURRENT, cp=2, pp=4, vp=8)


def llama3_8b_dense_ct_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3 8B: CP2, as NeMo's and Bridge's own recipes of the model."""
    return dense_run(LLAMA3_8B, cp=2)


def llama31_8b_e8t2_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of Llama 3.1 8B, whose RoPE scaling is kept: TP2 PP4 VPP8 EP8."""
    return upcycled_run(LLAMA31_8B, tp=2, pp=4, vp=8)


def llama31_8b_e8t2_pretrain_128gpu_h100_fp8cs_config() -> UpcyclingConfig:
    """Return the fast run of Llama 3.1 8B in FP8 with current scaling: CP2 PP4 VPP8 EP8."""
    return fast_run(LLAMA31_8B, _CURRENT, cp=2, pp=4, vp=8)


def llama31_8b_dense_ct_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3.1 8B: CP2."""
    return dense_run(LLAMA31_8B, cp=2)


def llama3_70b_e8t2_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of Llama 3 70B: TP8 CP2 PP16 VPP5 EP8, after Parallel Folding (arXiv 2504.14960)."""
    return upcycled_run(LLAMA3_70B, tp=8, cp=2, pp=16, vp=5)


def llama3_70b_e8t2_pretrain_512gpu_h100_fp8sc_config() -> UpcyclingConfig:
    """Return the fast run of Llama 3 70B in FP8 with blockwise (subchannel) scaling, on the same layout."""
    return fast_run(LLAMA3_70B, _BLOCKWISE, tp=8, cp=2, pp=16, vp=5)


def llama3_70b_dense_ct_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3 70B: TP4 CP2 PP4 VPP5, as NeMo's and Bridge's own recipes of the model."""
    return dense_run(LLAMA3_70B, tp=4, cp=2, pp=4, vp=5)


def llama32_1b_e8t2_pretrain_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of Llama 3.2 1B: EP8."""
    return upcycled_run(LLAMA32_1B)


def llama32_1b_dense_ct_pretrain_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3.2 1B: CP2."""
    return dense_run(LLAMA32_1B, cp=2)


def llama32_3b_e8t2_pretrain_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of Llama 3.2 3B: CP2 EP8."""
    return upcycled_run(LLAMA32_3B, cp=2)


def llama32_3b_dense_ct_pretrain_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of Llama 3.2 3B: CP2."""
    return dense_run(LLAMA32_3B, cp=2)
