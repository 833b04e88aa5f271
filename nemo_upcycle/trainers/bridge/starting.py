"""Construct of a configuration what Bridge constructs in a job before its first step, and tell why that fails."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.config import ConfigContainer, runtime_config_update
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.trainers.bridge.config import required_hook
from nemo_upcycle.trainers.trial import construct_ranks, construction_errors, wrong_choices


#: Optimizers of Megatron: its own, and those that register themselves.
_OPTIMIZERS = {"adam", "sgd", "lion", *_EMERGING_OPTIMIZERS}


def wrong_in(config: ConfigContainer, layout: Layout, unit: str) -> list[UpcycleError]:
    """Return why a job of a configuration would end before its first step, as far as construction shows it.

    Args:
        config: a result of `load_config`.
        layout: the job's.
        unit: name of the training, for the text of errors.
    """
    hook = required_hook(config)
    parent = read_architecture(hook.paths[0])
    arch = parent.upcycled(hook.spec) if hook.spec else parent
    wrong = list(wrong_choices(config.model, "model."))
    if (name := config.optimizer.optimizer.removeprefix("dist_")) not in _OPTIMIZERS:
        wrong.append(UpcycleError.unknown("optimizer.optimizer", name, _OPTIMIZERS))
    elif name in _EMERGING_OPTIMIZERS and find_spec("emerging_optimizers") is None:
        expected, fix = "package emerging-optimizers", "pip install emerging-optimizers"
        wrong.append(UpcycleError(field="optimizer.optimizer", got=f"{name} without it", expected=expected, fix=fix))
    if (kind := config.tokenizer.tokenizer_type) is None:
        fix = "omit it where the recipe has one, or set it to NullTokenizer, with tokenizer.vocab_size"
        wrong.append(UpcycleError(field="tokenizer.tokenizer_type", got=kind, expected="a kind of tokenizer", fix=fix))
    if wrong:
        return wrong
    found = construction_errors(lambda: _construct(copy.deepcopy(config), layout, arch), unit)
    return [error.renamed(lambda name: name.replace(".config.", ".")) for error in found]


def _construct(config: ConfigContainer, layout: Layout, arch: Architecture) -> list[UpcycleError]:
    """Construct what the job does; return where the model is not what is made of the parent."""

    def configure() -> Any:
        runtime_config_update(config)
        kind, model = config.tokenizer.tokenizer_type, config.tokenizer.tokenizer_model
        if kind and (model is None or Path(model).exists()):
            build_tokenizer(config.tokenizer)
        config.model._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        return config.model

    def make_chunk(model: Any, number: int | None) -> Any:
        with torch.device("meta"):  # a HybridModelProvider asks no setting
            return model.provide(vp_stage=number)

    return construct_ranks(layout, configure, make_chunk, None if arch.mamba else arch)
