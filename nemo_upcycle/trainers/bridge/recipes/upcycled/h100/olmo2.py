"""OLMo 2 7B upcycled to 8 experts, top-2, on H100; exported as FlexOlmo. Its sequences have 4096 tokens."""

from __future__ import annotations

from nemo_upcycle.trainers.bridge.recipes.upcycled.runs import dense_run, upcycled_run
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


_OLMO2_7B = "hf://allenai/OLMo-2-1124-7B"


def olmo2_7b_e8t2_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the training of OLMo 2 7B: PP2 VPP16 EP8, in sequences of 4096."""
    return upcycled_run(_OLMO2_7B, pp=2, vp=16, seq_length=4096)


def olmo2_7b_dense_ct_pretrain_512gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the dense baseline of OLMo 2 7B: CP2, in sequences of 4096."""
    return dense_run(_OLMO2_7B, cp=2, seq_length=4096)
