"""A trial construction of the objects that NeMo builds before a job's first step, to find errors before the start."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.llm.api import _validate_config
from nemo.lightning import _strategy_lib
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.layout import layout_of
from nemo_upcycle.trainers.monitoring.fp8_statistics import require_inspect
from nemo_upcycle.trainers.nemo.checks import parent_within_reach, ranks_of
from nemo_upcycle.trainers.nemo.recipes import recipe_spec
from nemo_upcycle.trainers.settings import setting
from nemo_upcycle.trainers.trial import construct_ranks, construction_errors, failure_of, text_of
from nemo_upcycle.utils.attributes import temporarily_set


#: Arguments of Lightning's trainer that the trial leaves out: they select hardware or objects, or change the process.
_NOT_TRIED = ("accelerator", "devices", "num_nodes", "precision", "logger", "deterministic", "benchmark")


def wrong_in(recipe: Any, dense: Parent, unit: str) -> list[UpcycleError]:
    """Construct the objects of a recipe's job, and return the errors that would end the job before its first step.

    Args:
        recipe: recipe of a training job.
        dense: the dense parent; if it is known, the recipe's model is compared with the model that the spec makes.
        unit: name of the training, for error messages.
    """
    parent = parent_within_reach(dense)
    spec = recipe_spec(recipe) if setting(recipe, "resume.restore_config.spec") else None
    arch = parent.upcycled(spec) if parent and spec else parent
    return construction_errors(lambda: _construct(recipe, arch), unit)


def _construct(recipe: Any, arch: Architecture | None) -> list[UpcycleError]:
    """Construct the objects that the job constructs; return the model's differences from the expected architecture."""
    trainer = recipe.trainer.__arguments__
    plain = {name: value for name, value in trainer.items() if isinstance(value, int | float | str)}
    others: dict[str, Any] = {name: value for name, value in plain.items() if name not in _NOT_TRIED}
    pl.Trainer(**others | {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False})
    for path in ("optim.config", "optim.lr_scheduler"):
        if isinstance(part := setting(recipe, path), fdl.Buildable):
            fdl.build(part)
    nodes, per_node = ranks_of(recipe)
    layout = layout_of(recipe.trainer.strategy, nodes * per_node, recipe.data.micro_batch_size)

    def configure() -> Any:
        config, strategy = fdl.build(recipe.model.config), fdl.build(recipe.trainer.strategy)
        plugins = setting(recipe, "trainer.plugins")
        types = fdl.build(plugins).dtype_config if isinstance(plugins, fdl.Buildable) else None
        if types and strategy.pipeline_dtype is None:
            strategy.pipeline_dtype = types.pipeline_dtype
        model = SimpleNamespace(config=config, configure_model=None)
        _validate_config(model, recipe.data, SimpleNamespace(strategy=strategy, num_devices=per_node, num_nodes=nodes))
        _strategy_lib.set_model_parallel_attributes(model, strategy.parallelism)
        if types:
            update_config_with_dtype_overrides(types, config)
        if config.vocab_size is None:
            config.vocab_size = layout.padded_vocab(arch) if arch else layout.tp
        return config

    return construct_ranks(layout, configure, lambda config, vp: config.configure_model(None, vp_stage=vp), arch)


def lacking_here(recipe: Any, where: str = "", *, in_stage: bool = False) -> Iterator[UpcycleError]:
    """Yield the GPUs and kernels that a recipe needs and this machine lacks.

    Args:
        recipe: recipe of a training job.
        where: prefix of the recipe's overrides, for error messages.
        in_stage: whether the training runs in a stage of the chain, which needs no kernels on a CPU.
    """
    _, per_node = ranks_of(recipe, where)
    wants_gpu = setting(recipe, "trainer.accelerator") in ("gpu", "cuda")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wants_gpu and per_node > here:
        name, got = ("accelerator", "gpu") if not here else ("devices", per_node)
        yield UpcycleError(
            f"{where}trainer.{name}",
            kind="refused",
            got=f"is {got}, but the number of GPUs on this machine is {here}"
            if here
            else f"is {got}, and this machine has no GPU",
            fix=f"set it to {here}"
            if here
            else "train on a machine with GPUs, or set the accelerator to cpu for a trial",
        )
    statistics = "trainer.callbacks.MetricsLogger.fp8_statistics_every"
    try:
        require_inspect(setting(recipe, statistics) or 0, f"{where}{statistics}")
    except UpcycleError as error:
        yield error
    if in_stage and not here:
        return

    with temporarily_set(TransformerConfig, "__post_init__", inspect.unwrap(TransformerConfig.__post_init__)):
        failure = failure_of(lambda: fdl.build(recipe.model.config))
    if failure:
        yield UpcycleError(f"{where}model.config cannot be constructed on this machine: {text_of(failure)}.")
