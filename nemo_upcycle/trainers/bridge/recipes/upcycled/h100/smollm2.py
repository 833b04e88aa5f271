"""SmolLM2-135M upcycled to 8 experts, top-2, and its dense baseline: real models that need one GPU, or none."""

from __future__ import annotations

from nemo_upcycle.trainers.bridge.recipes.upcycled.runs import E8T2, small_run
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


SMOLLM2_135M = "asset://smollm2-135m"


def smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return a short training of the upcycled SmolLM2-135M, whose weights come with this package's assets."""
    return small_run(SMOLLM2_135M, E8T2)


def smollm2_135m_dense_ct_pretrain_1gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return a short training of SmolLM2-135M as it is: the baseline that the upcycled model has to beat."""
    return small_run(SMOLLM2_135M, None)
