"""Build the trainings of the Megatron-Bridge recipes in `recipes/`, with the numbers of the NeMo recipes.

A recipe's file and `trainers/nemo/paper_recipe.py` give the reasons for the numbers, and say which numbers arXiv
2412.09952 states.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.mixed_precision import get_mixed_precision_config

from nemo_upcycle.planning.recipe_table import Run, Schedule, Tuning
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.bridge.chat import ChatDataset
from nemo_upcycle.trainers.bridge.node import UpcyclingConfig
from nemo_upcycle.trainers.bridge.recipes.common import upcycled_pretraining


#: Number of GPUs that NVLink joins in a GB200 rack.
NVL72 = 72
#: Maps the precision in the name of a fast run to Bridge's mixed precision.
PRECISIONS = {"fp8cs": "bf16_with_fp8_current_scaling_mixed", "fp8sc": "bf16_with_fp8_subchannel_scaling_mixed"}


def upcycled_run(
    dense: str, layout: Run, schedule: Schedule, spec: UpcycleSpec, data: str | None = None, **settings: Any
) -> UpcyclingConfig:
    """Make the paper's training: EP8 and capacity factor 4, which drops nothing with 8 experts and top-2.

    MoE layers are recomputed in every step, because routers start unbalanced. NeMo's recipes recompute them only in
    the first 500 steps.

    Args:
        dense: the dense checkpoint, see `with_upcycling`.
        layout: number of GPUs, and layout.
        schedule: steps, batches and learning rates.
        spec: how to upcycle.
        data: a finished folder of `nemo-upcycle data`; None: Bridge's mock data.
        settings: model settings to change.
    """
    own: dict[str, Any] = {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
        "moe_expert_capacity_factor": 4.0,
    }
    return _paper_run(dense, layout, schedule, spec, data, **(own | settings))


def hybridep_run(
    dense: str,
    layout: Run,
    schedule: Schedule,
    spec: UpcycleSpec,
    data: str | None = None,
    *,
    nvlink_gpus: int = 8,
    **settings: Any,
) -> UpcyclingConfig:
    """Make `upcycled_run` with HybridEP and without a capacity limit, as in Bridge's own Qwen3-MoE recipes.

    Args:
        dense: see `upcycled_run`.
        layout: see `upcycled_run`.
        schedule: see `upcycled_run`.
        spec: see `upcycled_run`.
        data: see `upcycled_run`.
        nvlink_gpus: number of GPUs that NVLink joins: 8 in a usual machine, or `NVL72`.
        settings: see `upcycled_run`.
    """
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep", "moe_router_dtype": "fp32"}
    config = upcycled_run(dense, layout, schedule, spec, data, moe_expert_capacity_factor=None, **flex, **settings)
    config.env_vars |= {
        "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN": min(config.model.expert_model_parallel_size, nvlink_gpus),
        "NUM_OF_TOKENS_PER_CHUNK_COMBINE_API": 128,
        "NVLINK_DOMAIN_SIZE": nvlink_gpus,
        "USE_MNNVL": int(nvlink_gpus > 8),
    }
    return config


def mxfp8_run(
    dense: str, layout: Run, schedule: Schedule, spec: UpcycleSpec, data: str | None = None
) -> UpcyclingConfig:
    """Make the fast MXFP8 run on GB200 racks: HybridEP, no capacity limit, no recomputation. Nobody has run it yet.

    Apart from the layout, the run has the settings of Bridge's own Qwen3-MoE recipe for GB200 (`recipes/qwen/gb200`),
    with one difference: parameters stay in BF16, because filling MXFP8 parameters has not been tried on a GPU yet.

    Args:
        dense: see `upcycled_run`.
        layout: see `upcycled_run`.
        schedule: see `upcycled_run`.
        spec: see `upcycled_run`.
        data: see `upcycled_run`.
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
    config = hybridep_run(dense, layout, schedule, spec, data, nvlink_gpus=NVL72, **settings)
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


def fast_run(
    dense: str, layout: Run, schedule: Schedule, spec: UpcycleSpec, data: str | None = None
) -> UpcyclingConfig:
    """Make the fast FP8 run: capacity factor 1 with padding, no recomputation. Nobody has run it yet.

    Parameters stay in BF16, because filling FP8 parameters (`fp8_param_gather`) has not been tried on a GPU yet.
    Gradients are reduced in BF16, as in Bridge's `perf_recipes`.

    Args:
        dense: see `upcycled_run`.
        layout: see `upcycled_run`.
        schedule: see `upcycled_run`.
        spec: see `upcycled_run`.
        data: see `upcycled_run`.
    """
    capacity = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    config = _paper_run(dense, layout, schedule, spec, data, **capacity)
    config.mixed_precision = get_mixed_precision_config(PRECISIONS[layout.precision])
    config.mixed_precision.fp8_param_gather = False
    config.mixed_precision.grad_reduce_in_fp32 = config.ddp.grad_reduce_in_fp32 = False
    return config


def dense_run(dense: str, layout: Run, schedule: Schedule, data: str | None = None) -> UpcyclingConfig:
    """Make the training of the dense baseline, with the same data, batches and learning rates.

    Args:
        dense: see `upcycled_run`.
        layout: see `upcycled_run`.
        schedule: see `upcycled_run`.
        data: see `upcycled_run`.
    """
    return _paper_run(dense, layout, schedule, None, data)


def small_run(dense: str, schedule: Schedule, spec: UpcycleSpec | None, data: str | None = None) -> UpcyclingConfig:
    """Make a training of a few steps, on one GPU or on a CPU.

    Args:
        dense: see `upcycled_run`.
        schedule: see `upcycled_run`.
        data: see `upcycled_run`.
        spec: how to upcycle the parent; None for the dense baseline.
    """
    config = upcycled_pretraining(dense, spec, seq_length=schedule.seq_length, data=data)
    _train_by(config, schedule)
    config.train.micro_batch_size = 1
    config.validation.eval_interval, config.validation.eval_iters = 3, 1
    config.checkpoint.save_interval, config.checkpoint.most_recent_k = 10, 1
    # Saving for other layouts gathers the optimizer's state in memory (8 GB more for SmolLM2-135M with 8 experts).
    config.checkpoint.dist_ckpt_optim_fully_reshardable = False
    config.dataset.num_workers = 0  # on a CPU, a loader process would keep a copy of the initial weights
    return config


def tuned(config: UpcyclingConfig, tuning: Tuning, data: str | None = None) -> UpcyclingConfig:
    """Turn one of these trainings into a tuning on conversations that starts from the dense checkpoint.

    The tuning upcycles its dense parent at its start. It runs Bridge's `pretrain`, because Bridge's `finetune` needs
    an existing checkpoint. The data are a finished folder of `nemo-upcycle chat`, which `dataset.folder` names.

    Args:
        config: configuration of the training; changed in place. Its layout stays, except for context parallelism.
        tuning: batches, steps and learning rates.
        data: a finished folder of `nemo-upcycle chat`; None: `dataset.folder` is set later.
    """
    schedule = tuning.schedule
    config.dataset = ChatDataset(
        folder=data or "", seq_length=schedule.seq_length, num_workers=config.dataset.num_workers
    )
    config.model.seq_length, config.model.context_parallel_size = schedule.seq_length, 1
    _train_by(config, schedule)
    config.validation.eval_interval = config.checkpoint.save_interval = max(1, schedule.steps // 4)
    config.validation.eval_iters = 32  # the pipeline lowers this number if fewer packs are held out
    return config


def _train_by(config: UpcyclingConfig, schedule: Schedule) -> None:
    config.optimizer.lr, config.optimizer.min_lr = schedule.lr, schedule.min_lr
    config.scheduler.lr_warmup_iters = schedule.warmup_steps
    config.train.train_iters, config.train.global_batch_size = schedule.steps, schedule.global_batch


def _paper_run(
    dense: str, layout: Run, schedule: Schedule, spec: UpcycleSpec | None, data: str | None = None, **model: Any
) -> UpcyclingConfig:
    """Make the paper's training in a given layout.

    Args:
        dense: see `upcycled_run`.
        layout: see `upcycled_run`.
        schedule: see `upcycled_run`.
        data: see `upcycled_run`.
        spec: how to upcycle the parent; None for the dense baseline.
        model: further settings of the model.
    """
    model |= {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.tp > 1,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp,
        "pipeline_dtype": torch.bfloat16,
        "context_parallel_size": layout.cp,
    }
    if spec is not None:
        model |= {"expert_model_parallel_size": 8, "expert_tensor_parallel_size": 1}
    config = upcycled_pretraining(dense, spec, seq_length=schedule.seq_length, data=data, **model)
    _train_by(config, schedule)
    config.comm_overlap = CommOverlapConfig(tp_comm_overlap=False)  # hides the many sends of virtual stages
    return config
