"""Llama 3 8B upcycled to 8 experts, top-2: the paper's run (arXiv 2412.09952) in Megatron-Bridge."""

from __future__ import annotations

from typing import Any

import torch
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import bf16_with_fp8_current_scaling_mixed

from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.bridge.recipes.common import upcycled_pretraining


_DENSE = "hf://meta-llama/Meta-Llama-3-8B"
_SPEC = UpcycleSpec(num_experts=8, top_k=2)
_SEQ_LENGTH, _BATCH = 8192, 512
_TOKENS = 100_000_000_000


def llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config() -> ConfigContainer:
    """Return the paper's training on 512 H100: TP2 PP4 VPP8 EP8, capacity factor 4, 100B tokens, 3e-5 to 3e-7.

    `recipes/llama3_8b_e8t2.py` says what the paper states and what it does not. MoE layers are recomputed throughout,
    for routers start unbalanced; NeMo's recipe does so in the first 500 steps only.
    """
    return _paper(
        recompute_granularity="selective",
        recompute_modules=["moe"],
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=8,
        pipeline_dtype=torch.bfloat16,
        moe_expert_capacity_factor=4.0,
    )


def llama3_8b_e8t2_pretrain_128gpu_h100_fp8cs_config() -> ConfigContainer:
    """Return the fast run on 128 H100: CP2 PP4 VPP8 EP8, capacity factor 1 with padding, FP8 with current scaling.

    The paper reports 462.8 TFLOP/s a GPU for this layout in BF16, in NeMo. Parameters stay in BF16: Bridge's precision
    would gather FP8 ones, which cannot be filled. FP8 has not been run.
    """
    config = _paper(
        context_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=8,
        pipeline_dtype=torch.bfloat16,
        moe_expert_capacity_factor=1.0,
        moe_pad_expert_input_to_capacity=True,
    )
    config.mixed_precision = bf16_with_fp8_current_scaling_mixed()
    config.mixed_precision.fp8_param_gather = False
    return config


def llama3_8b_dense_ct_pretrain_512gpu_h100_bf16_config() -> ConfigContainer:
    """Return the dense baseline on 512 H100, by the same data, batches and learning rates: TP1 CP2, no pipeline.

    The paper's dense run states no layout; this is the one of NeMo's and of Bridge's own recipe of the model.
    """
    return _by_paper(None, context_parallel_size=2)


def _paper(**settings: Any) -> ConfigContainer:
    layout = {"expert_model_parallel_size": 8, "expert_tensor_parallel_size": 1}
    return _by_paper(_SPEC, **layout, **settings)


def _by_paper(spec: UpcycleSpec | None, **settings: Any) -> ConfigContainer:
    config = upcycled_pretraining(_DENSE, spec, seq_length=_SEQ_LENGTH, **settings)
    config.train.global_batch_size, config.train.micro_batch_size = _BATCH, 1
    config.train.train_iters = -(-_TOKENS // (_BATCH * _SEQ_LENGTH))
    config.checkpoint.save_interval = 1000
    config.optimizer.lr, config.optimizer.min_lr = 3e-5, 3e-7
    config.scheduler.lr_warmup_iters = 100
    config.comm_overlap = CommOverlapConfig(tp_comm_overlap=False)  # virtual stages send eight times as often
    return config
