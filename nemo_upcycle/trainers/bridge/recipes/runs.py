"""The trainings of recipes, with the numbers of NeMo's; a row of `conf/planning/recipes.yaml` adds the layout.

The table and `recipes/h100.py` give the reasons: what arXiv 2412.09952 states, what it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.mixed_precision import get_mixed_precision_config

from nemo_upcycle.planning.recipe_table import SPEC
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.bridge.chat import ChatDataset
from nemo_upcycle.trainers.bridge.recipes.common import upcycled_pretraining
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


#: GPUs that NVLink joins in a rack of GB200.
NVL72 = 72
#: What a recipe's name has of a fast run's precision -> Bridge's mixed precision.
PRECISIONS = {"fp8cs": "bf16_with_fp8_current_scaling_mixed", "fp8sc": "bf16_with_fp8_subchannel_scaling_mixed"}


def upcycled_run(dense: str, **settings: Any) -> UpcyclingConfig:
    """Make the paper's training: EP8, capacity factor 4, which drops nothing with 8 experts and top-2.

    MoE layers are recomputed throughout, for routers start unbalanced; NeMo's recipes do so in the first 500 steps.

    Args:
        dense: the dense checkpoint, see `upcycled_pretraining`.
        settings: the layout, see `_paper_run`, and what else differs in the model.
    """
    own: dict[str, Any] = {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
        "moe_expert_capacity_factor": 4.0,
    }
    return _paper_run(dense, SPEC, **(own | settings))


def hybridep_run(dense: str, *, nvlink_gpus: int = 8, **settings: Any) -> UpcyclingConfig:
    """Make `upcycled_run` with HybridEP and no capacity, as Bridge's own recipes of Qwen3-MoE have it.

    Args:
        dense: the dense checkpoint.
        nvlink_gpus: number of GPUs that NVLink joins: 8 in a usual machine, or `NVL72`.
        settings: see `upcycled_run`.
    """
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep", "moe_router_dtype": "fp32"}
    config = upcycled_run(dense, moe_expert_capacity_factor=None, **flex, **settings)
    config.env_vars |= {
        "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN": min(config.model.expert_model_parallel_size, nvlink_gpus),
        "NUM_OF_TOKENS_PER_CHUNK_COMBINE_API": 128,
        "NVLINK_DOMAIN_SIZE": nvlink_gpus,
        "USE_MNNVL": int(nvlink_gpus > 8),
    }
    return config


def mxfp8_run(dense: str, **layout: int) -> UpcyclingConfig:
    """Make the fast run in MXFP8 on racks of GB200: HybridEP, no capacity, nothing recomputed. It has not been run.

    What it sets beside the layout is what Bridge's own recipe of Qwen3-MoE for GB200 sets (`recipes/qwen/gb200`), but
    that parameters stay in BF16 until MXFP8 ones have been filled on a GPU.

    Args:
        dense: the dense checkpoint.
        layout: see `_paper_run`.
    """
    settings: dict[str, Any] = {
        "recompute_granularity": None,
        "recompute_modules": None,
        "moe_hybridep_num_sms": 32,
        "moe_hybridep_num_sms_preprocessing": 32,
        "high_priority_a2a_comm_stream": True,
        "use_transformer_engine_op_fuser": True,
        "moe_mlp_glu_interleave_size": 32,
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_scope": ["moe_router", "moe_preprocess"],
        "use_te_rng_tracker": True,
    }
    config = hybridep_run(dense, nvlink_gpus=NVL72, **settings, **layout)
    config.rng.te_rng_tracker = True
    config.mixed_precision = get_mixed_precision_config("bf16_with_mxfp8_mixed")
    config.mixed_precision.fp8_param_gather = config.mixed_precision.reuse_grad_buf_for_mxfp8_param_ag = False
    config.mixed_precision.fp8_dot_product_attention = True
    config.mixed_precision.grad_reduce_in_fp32 = config.ddp.grad_reduce_in_fp32 = False
    config.comm_overlap = CommOverlapConfig(
        tp_comm_overlap=False, overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True
    )
    config.env_vars |= {
        "CUDA_DEVICE_MAX_CONNECTIONS": 32,
        "CUDNNFE_CLUSTER_OVERLAP_MARGIN": 8,
        "NVTE_BWD_LAYERNORM_SM_MARGIN": 20,
        "NVTE_CUTEDSL_FUSED_GROUPED_MLP": 1,
        "NVTE_FWD_LAYERNORM_SM_MARGIN": 20,
    }
    return config


def fast_run(dense: str, precision: str, **layout: int) -> UpcyclingConfig:
    """Make the fast run in FP8: capacity factor 1 with padding, nothing recomputed. FP8 has not been run.

    Parameters stay in BF16 until FP8 ones (`fp8_param_gather`) have been filled on a GPU. Gradients are reduced in
    BF16, as in Bridge's `perf_recipes`.

    Args:
        dense: the dense checkpoint.
        precision: the name of Bridge's mixed precision.
        layout: see `_paper_run`.
    """
    config = _paper_run(dense, SPEC, moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True, **layout)
    config.mixed_precision = get_mixed_precision_config(precision)
    config.mixed_precision.fp8_param_gather = False
    config.mixed_precision.grad_reduce_in_fp32 = config.ddp.grad_reduce_in_fp32 = False
    return config


def dense_run(dense: str, **layout: int) -> UpcyclingConfig:
    """Make the training of the dense baseline, by the same data, batches and learning rates.

    Args:
        dense: the dense checkpoint.
        layout: see `_paper_run`.
    """
    return _paper_run(dense, None, **layout)


def small_run(dense: str, spec: UpcycleSpec | None) -> UpcyclingConfig:
    """Make a training of a few steps, on one GPU, or on none.

    Args:
        dense: the dense checkpoint.
        spec: how to upcycle it; None for the dense baseline.
    """
    config = upcycled_pretraining(dense, spec, seq_length=512)
    config.optimizer.lr, config.optimizer.min_lr, config.scheduler.lr_warmup_iters = 1e-4, 1e-5, 2
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = 6, 2, 1
    config.validation.eval_interval, config.validation.eval_iters = 3, 1
    config.checkpoint.save_interval, config.checkpoint.most_recent_k = 10, 1
    return config


def tuned(config: UpcyclingConfig, tuning: Mapping[str, Any]) -> UpcyclingConfig:
    """Let one of these trainings tune on conversations instead, from the dense checkpoint on; see `recipes/tuning.py`.

    Args:
        config: the training; changed in place. Its layout stays, but for context parallelism.
        tuning: `seq_length` (places of a pack), `global_batch_size` (packs of a step), `max_steps`, `warmup_steps` and
            `lr`, the highest learning rate, which falls to a tenth.
    """
    seq_length, highest = tuning["seq_length"], tuning["lr"]
    config.dataset = ChatDataset(folder="", seq_length=seq_length, num_workers=config.dataset.num_workers)
    config.model.seq_length, config.model.context_parallel_size = seq_length, 1
    config.train.train_iters, config.train.global_batch_size = tuning["max_steps"], tuning["global_batch_size"]
    config.validation.eval_interval = config.checkpoint.save_interval = max(1, tuning["max_steps"] // 4)
    config.validation.eval_iters = 32  # the chain takes all packs that are held back for it, if that is less
    config.optimizer.lr, config.optimizer.min_lr = highest, float(f"{highest / 10:g}")
    config.scheduler.lr_warmup_iters = tuning["warmup_steps"]
    return config


def _paper_run(
    dense: str,
    spec: UpcycleSpec | None,
    *,
    tp: int = 1,
    pp: int = 1,
    vp: int | None = None,
    cp: int = 1,
    seq_length: int = 8192,
    **model: Any,
) -> UpcyclingConfig:
    """Make the paper's training in a layout.

    Args:
        dense: the dense checkpoint.
        spec: how to upcycle it; None for the dense baseline.
        tp: tensor parallelism of the attention; above 1 with sequence parallelism.
        pp: pipeline stages.
        vp: chunks of each stage.
        cp: ranks that share a sequence.
        seq_length: S.
        model: further settings of the model.
    """
    model |= {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
        "pipeline_dtype": torch.bfloat16,
        "context_parallel_size": cp,
    }
    if spec is not None:
        model |= {"expert_model_parallel_size": 8, "expert_tensor_parallel_size": 1}
    config = upcycled_pretraining(dense, spec, seq_length=seq_length, **model)
    config.comm_overlap = CommOverlapConfig(tp_comm_overlap=False)  # virtual stages send many times as often
    return config
