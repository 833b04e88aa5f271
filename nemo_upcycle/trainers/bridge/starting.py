"""Construct the objects that Bridge constructs in a job before its first step, and report why this fails."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.trainers.bridge.node import UpcyclingConfig, architecture_at
from nemo_upcycle.trainers.paged_models import build_bridges
from nemo_upcycle.trainers.trial import construct_ranks, construction_errors, wrong_choices


#: Megatron's built-in optimizers, and the optimizers that register themselves.
_OPTIMIZERS = {"adam", "sgd", "lion", *_EMERGING_OPTIMIZERS}


def wrong_in(config: UpcyclingConfig, layout: Layout, unit: str) -> list[UpcycleError]:
    """Construct a job's objects, and return the reasons why the job would end before its first step.

    Args:
        config: result of `load_config`.
        layout: layout of the job.
        unit: name of the training in error texts.
    """
    parent, spec = architecture_at(config.parents[0]), config.spec
    arch = parent.upcycled(spec) if spec else parent
    wrong = list(wrong_choices(config.model, "model."))
    if (name := config.optimizer.optimizer.removeprefix("dist_")) not in _OPTIMIZERS:
        wrong.append(UpcycleError.unknown("optimizer.optimizer", name, _OPTIMIZERS))
    elif name in _EMERGING_OPTIMIZERS and find_spec("emerging_optimizers") is None:
        fix = "run: pip install emerging-optimizers"
        wrong.append(
            UpcycleError(
                field="optimizer.optimizer",
                kind="missing",
                got=f"{name} needs the package emerging-optimizers, which is not installed",
                fix=fix,
            )
        )
    if config.tokenizer.tokenizer_type is None:
        fix = "omit the setting if the recipe has a tokenizer, or set NullTokenizer and tokenizer.vocab_size"
        wrong.append(UpcycleError(field="tokenizer.tokenizer_type", kind="missing", got="is null", fix=fix))
    if wrong:
        return wrong
    found = construction_errors(lambda: _construct(config, layout, arch), unit)
    return [error.renamed(lambda name: name.replace(".config.", ".")) for error in found]


def _construct(config: UpcyclingConfig, layout: Layout, arch: Architecture) -> list[UpcycleError]:
    """Construct the job's objects; return the differences between the model and its expected architecture."""

    def configure() -> Any:
        started = copy.deepcopy(config)
        runtime_config_update(started)
        kind, model = started.tokenizer.tokenizer_type, started.tokenizer.tokenizer_model
        if kind and (model is None or Path(model).exists()):
            build_tokenizer(started.tokenizer)
        return started.model

    def make_chunk(model: Any, number: int | None) -> Any:
        return build_bridges(model, vp_stage=number)

    return construct_ranks(layout, configure, make_chunk, None if arch.mamba else arch)
