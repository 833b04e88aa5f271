"""What the recipes of upcycled models have in common."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.recipes.utils.environment_utils import COMMON_RECIPE_ENV_VARS
from megatron.bridge.training.config import ConfigContainer
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.errors import SpecError
from nemo_upcycle.sources.fetch import ensure_dense
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers import paper
from nemo_upcycle.trainers.bridge.blend import BlendDataset
from nemo_upcycle.trainers.bridge.models import kept_settings, upcycled_provider
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig
from nemo_upcycle.trainers.bridge.upcycling import upcycle_on_start
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.validation import check_named, check_whole


#: Names the parent where no argument does: Bridge's recipes have no arguments.
DENSE = "NEMO_UPCYCLE_DENSE"
#: The parent that a chain was given, and its changes of the spec.
_MADE_FOR: ContextVar[tuple[str, Mapping[str, Any] | None] | None] = ContextVar("parent of a chain", default=None)


@contextmanager
def made_for(dense: Path, changes: Mapping[str, Any] | None) -> Iterator[None]:
    """Let recipes that are made while the block runs start from a checkpoint, by specs that differ in some fields.

    Args:
        dense: the checkpoint's folder, which replaces the recipe's own parent.
        changes: fields of the specs that are to differ; None: recipes train the checkpoint as it is.
    """
    token = _MADE_FOR.set((str(dense), changes))
    try:
        yield
    finally:
        _MADE_FOR.reset(token)


def parent_of(dense: str | None, default: str = "") -> str:
    """Choose the parent of a recipe: the argument, else NEMO_UPCYCLE_DENSE, else the default.

    Args:
        dense: the argument; None if none was given.
        default: parent that the recipe is named after; empty if there is none.

    Raises:
        SpecError: nothing names a parent.
    """
    source = dense or os.environ.get(DENSE) or default
    if not source:
        raise SpecError("dense", got=dense, expected="a parent", fix=f"pass a folder or hf://ORG/NAME, or set {DENSE}")
    return source


def upcycled_pretraining(
    dense: str | None, spec: UpcycleSpec | None, *, seq_length: int, **settings: Any
) -> UpcyclingConfig:
    """Make Bridge's pretraining of an upcycled model, or of its parent, by the paper's numbers and on mock data.

    Bridge's own numbers are for random weights; see `trainers.paper`. A run says at its start what it trains by, and
    of mock data that it is: set `config.dataset`.

    Args:
        dense: the dense checkpoint: a folder, `hf://ORG/NAME` or `asset://smollm2-135m`, fetched if it is not on this
            machine; None takes the variable NEMO_UPCYCLE_DENSE.
        spec: how to upcycle it; None continues it as it is.
        seq_length: S.
        settings: further ones of the model: layout and kernels.

    Example:
        >>> config = upcycled_pretraining("/models/mine", UpcycleSpec(), seq_length=8192)  # doctest: +SKIP
        >>> config.dataset = BlendDataset(folder="/data/mine", seq_length=8192)  # doctest: +SKIP
    """
    check_named("dense", dense)
    check_whole("seq_length", seq_length, 1)
    config = _pretrain_common()
    config.dataset.seq_length, config.train.micro_batch_size = seq_length, 1
    config.env_vars = dict(COMMON_RECIPE_ENV_VARS)
    return upcycled(config, dense, spec, seq_length=seq_length, **settings)


def upcycled(
    config: ConfigContainer,
    dense: str | None,
    spec: UpcycleSpec | None,
    data: str | Path | None = None,
    *,
    seq_length: int | None = None,
    **settings: Any,
) -> UpcyclingConfig:
    """Turn any pretraining of Bridge's into one that starts from a dense checkpoint, and say what changes.

    Layout, precision, kernels, recomputation, micro-batches, logging and folders stay; model, tokenizer, learning
    rates, schedule, steps and batches become the parent's and the paper's, and optimizer states are saved so that
    another layout can read them. Change what it returns as you would change Bridge's.

    Args:
        config: Bridge's recipe, or a configuration of one's own; it shares what does not change with the result.
        dense: the dense checkpoint, see `upcycled_pretraining`.
        spec: how to upcycle it; None continues it as it is: the dense baseline.
        data: a finished folder of `nemo-upcycle data`; None keeps the configuration's data.
        seq_length: S; None takes that of the configuration's data.
        settings: further ones of the model, which go before the configuration's.

    Raises:
        SpecError: no parent is named, or the run cannot be filled, or would not keep what it is filled with.
        UpcycleError: there is no such checkpoint, or the data are not finished.

    Example:
        >>> config = upcycled(my_config(), "/models/mine", UpcycleSpec(), "/data/mine")  # doctest: +SKIP
        >>> pretrain(config, forward_step, callbacks=upcycle_callbacks(config, "/runs/mine"))  # doctest: +SKIP
    """
    source, changes = _MADE_FOR.get() or (parent_of(dense), {})
    spec = None if spec is None or changes is None else replace(spec, **changes)
    folder = Path(source) if Path(source).is_dir() else ensure_dense(source)  # weights are checked when they are read
    seq_length = seq_length or config.dataset.seq_length
    given, config = config.model, UpcyclingConfig.of(config)
    kept = kept_settings(given) if given else {}
    model = upcycled_provider(folder, spec, **(kept | {"seq_length": seq_length} | settings))
    config.model = model
    if data:
        config.dataset = BlendDataset(folder=str(open_blend(Path(data)).folder), seq_length=seq_length)
    is_text = not isinstance(config.dataset, BlendDataset | GPTDatasetConfig)
    values = {
        "tokenizer.tokenizer_type": "HuggingFaceTokenizer" if is_text else "NullTokenizer",
        "tokenizer.tokenizer_model": None,  # of texts, the parent's
        "tokenizer.vocab_size": None if is_text else model.vocab_size - 1,
        "dataset.seq_length": seq_length,
        "train.train_iters": paper.STEPS,
        "train.global_batch_size": max(1, paper.TOKENS_A_STEP // seq_length),
        "validation.eval_interval": 2000,
        "checkpoint.save_interval": paper.CHECKPOINT_STEPS,
        "checkpoint.load": config.checkpoint.save,
        "checkpoint.most_recent_k": 2,  # Bridge keeps all
        "checkpoint.dist_ckpt_optim_fully_reshardable": True,
        "optimizer.lr": paper.PEAK,
        "optimizer.min_lr": paper.END,
        "optimizer.adam_eps": 1e-5,  # NeMo's
        "scheduler.lr_decay_style": "cosine",
        "scheduler.lr_decay_iters": None,
        "scheduler.lr_warmup_iters": paper.WARMUP_STEPS,
        "scheduler.lr_warmup_fraction": None,
        # Bridge's scheduler has 0.033, which takes the place of the optimizer's 0.1.
        "scheduler.start_weight_decay": config.optimizer.weight_decay,
        "scheduler.end_weight_decay": config.optimizer.weight_decay,
        "dist.distributed_timeout_minutes": 60,  # the first rank alone lays out the order of the samples
    }
    for name, value in values.items():
        part, _, field = name.partition(".")
        setattr(config, part, changed := copy.copy(getattr(config, part)))
        before = getattr(changed, field)
        setattr(changed, field, value)
        if given and before != value:
            show_messages().info("  %s: %s -> %s", name, before, value)
    upcycle_on_start(config, folder, spec)
    return config
