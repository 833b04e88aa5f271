"""Llama 3 8B, Qwen3 8B and 0.6B and SmolLM2-135M upcycled to 8 experts, top-2, and tuned on conversations, on H100.

Each upcycles its dense parent as it starts, by Bridge's `pretrain`, for its `finetune` has to find a checkpoint. The
data are a finished folder of `nemo-upcycle chat`, which `dataset.folder` names. `recipes/tuning.py` gives the reasons
for the numbers.
"""

from __future__ import annotations

from nemo_upcycle.trainers.bridge.recipes.upcycled.h100.qwen3 import QWEN3_8B, QWEN3_600M
from nemo_upcycle.trainers.bridge.recipes.upcycled.h100.smollm2 import SMOLLM2_135M
from nemo_upcycle.trainers.bridge.recipes.upcycled.runs import E8T2, dense_run, small_run, tuned, upcycled_run
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


#: The base model's tokenizer has no chat template.
LLAMA3_8B_INSTRUCT = "hf://meta-llama/Meta-Llama-3-8B-Instruct"
_ON_64 = {"seq_length": 4096, "global_batch": 128, "steps": 1000, "warmup": 50}
_ON_ONE = {"seq_length": 4096, "global_batch": 16, "steps": 500, "warmup": 25}
_ON_A_LAPTOP = {"seq_length": 512, "global_batch": 2, "steps": 8, "warmup": 2}


def llama3_8b_e8t2_sft_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the tuning of the upcycled Llama 3 8B Instruct: TP2 PP4 VPP8 EP8."""
    return tuned(upcycled_run(LLAMA3_8B_INSTRUCT, tp=2, pp=4, vp=8), highest=1e-5, **_ON_64)


def llama3_8b_dense_sft_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the tuning of Llama 3 8B Instruct as it is, the dense baseline, by data parallelism alone."""
    return tuned(dense_run(LLAMA3_8B_INSTRUCT), highest=1e-5, **_ON_64)


def qwen3_8b_e8t2_sft_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the tuning of the upcycled Qwen3 8B, whose base model has a chat template: TP2 PP4 VPP9 EP8."""
    return tuned(upcycled_run(QWEN3_8B, tp=2, pp=4, vp=9), highest=1e-5, **_ON_64)


def qwen3_8b_dense_sft_64gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the tuning of Qwen3 8B as it is, the dense baseline, by data parallelism alone."""
    return tuned(dense_run(QWEN3_8B), highest=1e-5, **_ON_64)


def qwen3_600m_e8t2_sft_1gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the tuning of the upcycled Qwen3-0.6B on one GPU."""
    return tuned(small_run(QWEN3_600M, E8T2), highest=1e-5, **_ON_ONE)


def qwen3_600m_dense_sft_1gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return the tuning of Qwen3-0.6B as it is, the dense baseline."""
    return tuned(small_run(QWEN3_600M, None), highest=1e-5, **_ON_ONE)


def smollm2_135m_e8t2_sft_1gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return a short tuning of the upcycled SmolLM2-135M-Instruct, on one GPU or none."""
    return tuned(small_run(SMOLLM2_135M, E8T2), highest=1e-5, **_ON_A_LAPTOP)


def smollm2_135m_dense_sft_1gpu_h100_bf16_config() -> UpcyclingConfig:
    """Return a short tuning of SmolLM2-135M-Instruct as it is, the dense baseline."""
    return tuned(small_run(SMOLLM2_135M, None), highest=1e-5, **_ON_A_LAPTOP)
