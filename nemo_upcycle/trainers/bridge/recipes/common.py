"""What the recipes of upcycled models have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.recipes.utils.environment_utils import COMMON_RECIPE_ENV_VARS

from nemo_upcycle.data.dense import ensure_dense
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers import paper
from nemo_upcycle.trainers.bridge.models import upcycled_provider
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig
from nemo_upcycle.trainers.bridge.upcycling import upcycle_on_start


#: Names the dense checkpoint of a recipe, for Bridge's recipes have no arguments.
DENSE = "NEMO_UPCYCLE_DENSE"


_CHANGES: ContextVar[Mapping[str, Any]] = ContextVar("changes of a spec")


@contextmanager
def made_for(dense: Path, changes: Mapping[str, Any]) -> Iterator[None]:
    """Let recipes that are made while the block runs start from a checkpoint, by specs that differ in some fields."""
    before, token = os.environ.get(DENSE), _CHANGES.set(changes)
    os.environ[DENSE] = str(dense)
    try:
        yield
    finally:
        _CHANGES.reset(token)
        del os.environ[DENSE]
        if before is not None:
            os.environ[DENSE] = before


def upcycled_pretraining(dense: str, spec: UpcycleSpec | None, *, seq_length: int, **settings: Any) -> UpcyclingConfig:
    """Make Bridge's pretraining of an upcycled model, or of its parent, by the paper's numbers and on mock data.

    Bridge's own numbers are for random weights; see `trainers.paper`. A run says at its start what it trains by, and
    of mock data that it is: set `config.dataset`.

    Args:
        dense: the dense checkpoint: a folder, `hf://ORG/NAME` or `asset://smollm2-135m`; the variable
            NEMO_UPCYCLE_DENSE takes its place. What is not on this machine is fetched.
        spec: how to upcycle it; None continues it as it is.
        seq_length: S.
        settings: further ones of the model: layout and kernels.

    Example:
        >>> config = upcycled_pretraining("/models/mine", UpcycleSpec(), seq_length=8192)  # doctest: +SKIP
        >>> config.dataset = BlendDataset(folder="/data/mine", seq_length=8192)  # doctest: +SKIP
    """
    source, spec = os.environ.get(DENSE, dense), replace(spec, **_CHANGES.get({})) if spec else None
    folder = Path(source) if Path(source).is_dir() else ensure_dense(source)  # weights are checked when they are read
    config = UpcyclingConfig.of(_pretrain_common())
    config.model = upcycled_provider(folder, spec, seq_length=seq_length, **settings)
    config.tokenizer.tokenizer_type = "NullTokenizer"
    config.tokenizer.tokenizer_model = None
    config.tokenizer.use_tokenizer_vocab_size = False
    config.tokenizer.vocab_size = config.model.vocab_size - 1
    config.dataset.seq_length = seq_length
    config.train.train_iters, config.train.micro_batch_size = paper.STEPS, 1
    config.train.global_batch_size = max(1, paper.TOKENS_A_STEP // seq_length)
    config.validation.eval_interval, config.checkpoint.save_interval = 2000, paper.CHECKPOINT_STEPS
    config.optimizer.lr, config.optimizer.min_lr = paper.PEAK, paper.END
    config.scheduler.lr_warmup_iters = paper.WARMUP_STEPS
    config.optimizer.adam_eps = 1e-5  # NeMo's
    # Bridge's scheduler has 0.033, which takes the place of the optimizer's 0.1.
    config.scheduler.start_weight_decay = config.scheduler.end_weight_decay = config.optimizer.weight_decay
    config.checkpoint.most_recent_k = 2  # Bridge keeps all
    config.dist.distributed_timeout_minutes = 60  # the first rank alone lays out the order of the samples
    config.env_vars = dict(COMMON_RECIPE_ENV_VARS)
    upcycle_on_start(config, folder, spec)
    return config
