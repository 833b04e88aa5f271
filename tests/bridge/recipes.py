"""Recipes of a user's own, of a model that trains at many steps a second: named `tests.bridge.recipes:tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_upcycle import UpcycleSpec
from tests.bridge.runs import run_config


SEQUENCE, BATCH = 64, 4


def tiny() -> Any:
    """An upcycled model on two ranks, with expert parallelism."""
    return _tiny(UpcycleSpec(num_experts=4, top_k=2), expert_model_parallel_size=2)


def tiny_hybrid() -> Any:
    """The same as a HybridModel."""
    spec = UpcycleSpec(num_experts=4, top_k=2)
    return _tiny(spec, expert_model_parallel_size=2, hybrid_layer_pattern="*E*E*E*E")


def tiny_dense_ct() -> Any:
    """Its dense baseline, in two pipeline stages: the first rank has no loss of its own."""
    return _tiny(None, pipeline_model_parallel_size=2)


def tiny_grown() -> Any:
    """Twice the experts of a parent that has four, two for a token, on two ranks."""
    return _tiny(UpcycleSpec(num_experts=8, top_k=4, router_std=0.0), expert_model_parallel_size=2)


def moe() -> Any:
    """An upcycled model on one rank: `tests.contract.trainers` sets all else."""
    return _tiny(UpcycleSpec(num_experts=8, top_k=2))


def dense_ct() -> Any:
    """Its dense baseline."""
    return _tiny(None)


def moe_sft() -> Any:
    """A tuning of the upcycled model on conversations."""
    return _tuned(moe())


def dense_sft() -> Any:
    """That of the dense model."""
    return _tuned(dense_ct())


def builder() -> Any:
    """A model in the form of Bridge's builders, which the chain does not take."""
    from nemo_upcycle.trainers.bridge.models import upcycled_config
    from nemo_upcycle.trainers.bridge.upcycling import hook_of, upcycle_on_start

    config = tiny()
    hook = hook_of(config)
    assert hook is not None
    config.model = upcycled_config(hook.paths[0], hook.spec, seq_length=SEQUENCE)
    upcycle_on_start(config, hook.paths[0], hook.spec)
    return config


def in_own_words(dense: Path, spec: UpcycleSpec | None, *branches: Path) -> Any:
    """A run whose parent is written in, made of Bridge's own configuration; it names no tokenizer."""
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    from nemo_upcycle.trainers.bridge.upcycling import upcycle_on_start

    config = run_config(dense, "run", spec, vocab_size=259, steps=2)
    config.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=None)
    upcycle_on_start(config, dense, spec, branches=branches)
    return config


def random() -> Any:
    """A run that starts from random weights."""
    from megatron.bridge.recipes.common import _pretrain_common

    config = _pretrain_common()
    config.model = _tiny(None).model
    config.model._pre_wrap_hooks = []
    return config


def _tuned(config: Any) -> Any:
    from nemo_upcycle.planning.recipe_table import Schedule, Tuning
    from nemo_upcycle.trainers.bridge.recipes.runs import tuned

    schedule = Schedule(SEQUENCE, BATCH, steps=6, lr=1e-3, min_lr=1e-4, warmup_steps=1)
    return tuned(config, Tuning(parent="", schedule=schedule))


def _tiny(spec: UpcycleSpec | None, **layout: Any) -> Any:
    from nemo_upcycle.trainers.bridge.recipes.common import upcycled_pretraining

    types = {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    config = upcycled_pretraining(None, spec, seq_length=SEQUENCE, **types, **layout)
    config.mixed_precision = None
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = 6, BATCH, 1
    config.validation.eval_interval, config.validation.eval_iters = 3, 1
    config.checkpoint.save_interval, config.checkpoint.most_recent_k = 2, -1
    config.optimizer.lr, config.optimizer.min_lr = 1e-3, 1e-5
    config.scheduler.lr_warmup_iters = 1
    config.dataset.num_workers = 0
    config.logger.tensorboard_dir = None
    return config
