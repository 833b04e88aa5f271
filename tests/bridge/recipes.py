"""Recipes as a user would write them, for a fast model. Commands name a recipe as `tests.bridge.recipes:tiny`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.planning.recipe_table import on_gpus
from tests.bridge.runs import run_config


SEQUENCE, BATCH = 64, 4


def tiny(dense: str) -> Any:
    """Return an upcycled model on two ranks, with expert parallelism."""
    return _tiny(dense, UpcycleSpec(num_experts=4, top_k=2), expert_model_parallel_size=2)


def tiny_hybrid(dense: str) -> Any:
    """Return the model of `tiny` as a HybridModel."""
    spec = UpcycleSpec(num_experts=4, top_k=2)
    return _tiny(dense, spec, expert_model_parallel_size=2, hybrid_layer_pattern="*E*E*E*E")


def tiny_dense_ct(dense: str) -> Any:
    """Return the dense baseline of `tiny` in two pipeline stages, so that the first rank computes no loss."""
    return _tiny(dense, None, pipeline_model_parallel_size=2)


def tiny_grown(dense: str) -> Any:
    """Return a parent with four experts, two per token, grown to eight on two ranks."""
    return _tiny(dense, UpcycleSpec(num_experts=8, top_k=4, router_std=0.0), expert_model_parallel_size=2)


def moe(dense: str) -> Any:
    """Return an upcycled model on one rank; `tests.contract.trainers` sets everything else."""
    return _tiny(dense, UpcycleSpec(num_experts=8, top_k=2))


def dense_ct(dense: str) -> Any:
    """Return the dense baseline of `moe`."""
    return _tiny(dense, None)


@on_gpus(1, tunes=True)
def moe_sft(dense: str) -> Any:
    """Return a run that fine-tunes the upcycled model on conversations."""
    return _tuned(moe(dense))


@on_gpus(1, tunes=True)
def dense_sft(dense: str) -> Any:
    """Return a run that fine-tunes the dense model on conversations."""
    return _tuned(dense_ct(dense))


def tiny_builder(dense: str) -> Any:
    """Return the run of `tiny` with a model configuration for Bridge's builders."""
    from megatron.bridge.recipes.common import _pretrain_common

    from nemo_upcycle.bridge import upcycled
    from nemo_upcycle.trainers.bridge.models import upcycled_config

    spec, config = UpcycleSpec(num_experts=4, top_k=2), _pretrain_common()
    config.model = upcycled_config(dense, spec, seq_length=SEQUENCE, expert_model_parallel_size=2, **_TYPES)
    config.dataset.seq_length, config.train.micro_batch_size = SEQUENCE, 1
    return _small(upcycled(config, dense, spec))


def in_own_words(dense: Path, spec: UpcycleSpec | None, *branches: Path) -> Any:
    """Return a run configuration of Bridge that names a parent but no tokenizer."""
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    from nemo_upcycle.bridge import with_parent, with_upcycling

    config = run_config(dense, "run", spec, vocab_size=259, steps=2)
    config.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=None)
    if spec is None:
        return with_parent(config, dense)
    return with_upcycling(config, dense, branches=[*map(str, branches)], **asdict(spec))


def random() -> Any:
    """Return a run that starts from random weights."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.recipes.common import _pretrain_common

    config = _pretrain_common()
    config.model = GPTModelProvider(num_layers=2, hidden_size=64, num_attention_heads=4)
    return config


def _tuned(config: Any) -> Any:
    from nemo_upcycle.planning.recipe_table import Schedule, Tuning
    from nemo_upcycle.trainers.bridge.recipes.runs import tuned

    schedule = Schedule(SEQUENCE, BATCH, steps=6, lr=1e-3, min_lr=1e-4, warmup_steps=1)
    return tuned(config, Tuning(parent="", schedule=schedule))


_TYPES = {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}


def _tiny(dense: str, spec: UpcycleSpec | None, **layout: Any) -> Any:
    from nemo_upcycle.bridge import upcycled_pretraining

    return _small(upcycled_pretraining(dense, spec, seq_length=SEQUENCE, **_TYPES, **layout))


def _small(config: Any) -> Any:
    config.mixed_precision = None
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = 6, BATCH, 1
    config.validation.eval_interval, config.validation.eval_iters = 3, 1
    config.checkpoint.save_interval, config.checkpoint.most_recent_k = 2, -1
    config.optimizer.lr, config.optimizer.min_lr = 1e-3, 1e-5
    config.scheduler.lr_warmup_iters = 1
    config.dataset.num_workers = 0
    config.logger.tensorboard_dir = None
    return config
