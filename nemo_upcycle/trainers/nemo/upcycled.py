"""Conversion of NeMo recipes of dense models into recipes that upcycle; this package's own recipes use it as well."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
from nemo import lightning as nl
from nemo.collections.llm import MockDataModule
from nemo.collections.llm.api import pretrain, train
from nemo.collections.llm.recipes.log.default import default_log, default_resume

from nemo_upcycle.data.blend_module import mock_tokenizer
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.balancing import BALANCING_LOSS
from nemo_upcycle.models.families import MoeFamily, find_nemo_module, parents
from nemo_upcycle.models.growth import router_dtype
from nemo_upcycle.models.layer_settings import layer_fields
from nemo_upcycle.models.megatron_config import moe_fields, router_fields
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.nemo.checks import check_settings
from nemo_upcycle.trainers.nemo.loss_guard import LossGuard
from nemo_upcycle.trainers.nemo.metrics import MetricsLogger
from nemo_upcycle.trainers.nemo.recipes import train_on
from nemo_upcycle.trainers.nemo.resume import UpcycleResume
from nemo_upcycle.trainers.nemo.stopping import StopOnSignal
from nemo_upcycle.trainers.nemo.upcycling import UpcycleConfig, UpcycleStrategy
from nemo_upcycle.trainers.settings import setting
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.ranks import is_first_rank


#: Maps a part of a recipe to NeMo's class and to this package's class, which replaces it and has the same settings.
_REPLACEMENTS = {
    "trainer.strategy": (nl.MegatronStrategy, UpcycleStrategy),
    "resume": (nl.AutoResume, UpcycleResume),
}
#: A setting in NeMo's recipes of Mistral and Qwen that no NeMo class accepts, so the setting has no effect.
_LEFT_OVER = "ckpt_include_optimizer"
_FAMILIES = ", ".join(family.title for family in parents() if family.nemo_module)


def upcycled(recipe: run.Partial, dense: str, spec: UpcycleSpec, data: str | None = None) -> run.Partial:
    """Turn a dense model's recipe into a recipe that first upcycles a dense checkpoint, and log the changes.

    Layout, batches, schedule, logging, callbacks and data stay as they are, unless experts need a change. The given
    recipe is not changed, so `start_from(recipe, dense, None)` can still make the dense baseline from it.

    Args:
        recipe: NeMo's recipe for a dense model of a family that this package supports, such as
            `llm.llama32_1b.pretrain_recipe()`, or your own `run.Partial(llm.pretrain, ...)`.
        dense: dense checkpoint: a Hugging Face folder, `hf://ORG/NAME` or `nemo:///absolute/path`.
        spec: how to upcycle the dense checkpoint.
        data: finished folder of `nemo-upcycle data`, made with the dense model's tokenizer; None: the recipe's data.

    Returns:
        The new recipe.

    Raises:
        SpecError: the recipe cannot be upcycled; the text names the setting and the reason.

    Example:
        >>> recipe = upcycled(  # doctest: +SKIP
        ...     llm.llama32_1b.pretrain_recipe(), "/models/Llama-3.2-1B", UpcycleSpec(num_experts=8, top_k=2)
        ... )
        >>> recipe.trainer.strategy.expert_model_parallel_size = 8  # doctest: +SKIP
    """
    _check_dense(recipe)
    made = start_from(copy.deepcopy(recipe), dense, spec, data)
    strategy = made.trainer.strategy
    if (tensor := strategy.tensor_model_parallel_size) > 1:
        strategy.sequence_parallel = True  # with tensor parallelism, Megatron trains experts only in this way
    is_unused = strategy.expert_model_parallel_size == 1 and not _own_experts(recipe.model.config)
    if is_unused and strategy.expert_tensor_parallel_size:
        strategy.expert_tensor_parallel_size = tensor  # NeMo's dense Qwen3 recipes set 1 without having experts
    check_settings(made)
    if is_first_rank():
        show_messages().info("Upcycled to %d experts, top-%d. Changed:", spec.num_experts, spec.top_k)
        for name, before, after in _changes(recipe, made):
            show_messages().info("  %s: %s -> %s", name, before, after)
    return made


def start_from(recipe: run.Partial, dense: str, spec: UpcycleSpec | None, data: str | None = None) -> run.Partial:
    """Let a training recipe start from a dense checkpoint, upcycled online or as it is, and train on a data folder.

    Args:
        recipe: NeMo pretraining recipe of the dense model; changed in place.
        dense: a Hugging Face folder, `hf://ORG/NAME` or `asset://smollm2-135m`.
        spec: how to upcycle; None: train the dense model as it is.
        data: finished folder of `nemo-upcycle data`, made with the dense model's tokenizer; None: the recipe's data.

    Returns:
        The recipe.
    """
    _complete(recipe)
    _take_ours(recipe, "trainer.strategy")
    if _LEFT_OVER in recipe.trainer.strategy.__arguments__:
        delattr(recipe.trainer.strategy, _LEFT_OVER)
    _take_ours(recipe, "resume")
    recipe.resume.restore_config = run.Config(UpcycleConfig, path=str(dense), spec=None)
    if spec:
        settings = router_fields(spec) if _own_experts(recipe.model.config) else moe_settings(spec)
        for name, value in settings.items():
            if name not in recipe.model.config.__arguments__ or name in router_fields(spec):
                setattr(recipe.model.config, name, value)
        _set_spec(recipe, spec)
    if data is not None:
        train_on(recipe, data, str(dense))
    elif recipe.data.__fn_or_cls__ is MockDataModule and recipe.data.tokenizer is None:
        # NeMo would fetch GPT-2's tokenizer, which has another vocabulary.
        recipe.data.tokenizer = run.Config(mock_tokenizer, dense=str(dense))
    own = (MetricsLogger, StopOnSignal)  # the recipe may already have these callbacks
    others = [callback for callback in recipe.trainer.callbacks or [] if callback.__fn_or_cls__ not in own]
    if not any(callback.__fn_or_cls__ is LossGuard for callback in others):
        others.insert(0, run.Config(LossGuard))  # before the callbacks that write a step's metrics or a checkpoint
    recipe.trainer.callbacks = [*others, *map(run.Config, own)]
    return recipe


def use_spec(recipe: run.Partial, spec: UpcycleSpec) -> run.Partial:
    """Let an upcycling recipe build another model: set the spec and every model field that follows from the spec.

    Args:
        recipe: recipe returned by `upcycled`, or one of this package's upcycling recipes; changed in place.
        spec: spec of the model to build.

    Returns:
        The recipe.

    Raises:
        SpecError: the recipe does not upcycle.

    Example:
        >>> recipe = llama3_8b_e8t2.pretrain_recipe()  # doctest: +SKIP
        >>> use_spec(recipe, UpcycleSpec(num_experts=64, top_k=8, granularity=8, shared_experts=1))  # doctest: +SKIP
    """
    if not setting(recipe, "resume.restore_config.spec"):
        raise SpecError(
            "resume.restore_config.spec",
            kind="missing",
            got="is missing, so the recipe does not upcycle",
            fix="make it with nemo_upcycle.recipes.upcycled(recipe, dense=..., spec=...)",
        )
    return _set_spec(recipe, spec)


def moe_settings(spec: UpcycleSpec) -> dict[str, Any]:
    """Return the fields that turn a dense NeMo model config into the config of the upcycled model."""
    fields = router_fields(spec)
    own = {name: fields[name] for name in ("num_moe_experts", "moe_router_topk", "moe_router_pre_softmax")}
    return own | BALANCING_LOSS | {"moe_token_dispatcher_type": "alltoall"}


def _set_spec(recipe: run.Partial, spec: UpcycleSpec) -> run.Partial:
    """Set the spec, and every model field that follows from the spec and has another value."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = recipe.model.config
    fields = router_fields(spec)
    if not _own_experts(config):
        fields = moe_fields(spec, config.ffn_hidden_size, config.num_layers) | router_dtype(spec)
        fields["moe_router_load_balancing_type"] = BALANCING_LOSS["moe_router_load_balancing_type"]
    for name, value in fields.items():
        now = getattr(config, name)
        if now is None and name == "moe_ffn_hidden_size":  # Megatron then uses ffn_hidden_size
            now = config.ffn_hidden_size
        if now != value:
            setattr(config, name, value)
    # NeMo's default builds all layers alike, so it cannot mix dense and MoE layers.
    if spec.moe_layers != "all" and not (layer_fields(config) or _own_experts(config)):
        config.transformer_layer_spec = run.Partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
    recipe.resume.restore_config.spec = run.Config(UpcycleSpec, **asdict(spec))  # all fields, so that people see them
    return recipe


def _own_experts(config: run.Config) -> int | None:
    """Return the number of experts that a model's class has by default, which are the experts of the parent."""
    return getattr(config.__fn_or_cls__, "num_moe_experts", None)


def _check_dense(recipe: Any) -> None:
    """Check that a recipe pretrains a model that can be upcycled: of a supported family, dense or with experts.

    Raises:
        SpecError: the model cannot be upcycled; the text says why.
    """
    if not isinstance(recipe, run.Partial):
        raise SpecError(
            "recipe",
            got=getattr(recipe, "__name__", type(recipe).__name__),
            expected="a run.Partial of llm.pretrain",
            fix="give the result of a model's pretrain_recipe()",
        )
    function = recipe.__fn_or_cls__
    is_other = function.__module__ == pretrain.__module__ and function not in (pretrain, train)
    if is_other or setting(recipe, "peft"):
        what = f"is for llm.{function.__name__}" if is_other else "has the setting peft"
        raise SpecError(
            "Recipe",
            kind="refused",
            got=f"{what}, and upcycling needs a recipe for llm.pretrain without peft",
            fix="upcycle in a pretraining run, and fine-tune its checkpoint",
        )
    for name in ("trainer.strategy", "model.config", "data"):
        if not isinstance(found := setting(recipe, name), run.Config):
            raise SpecError(name, got=found, expected="a run.Config", fix=f"give the recipe {name} as a run.Config")
    config = recipe.model.config
    if (experts := setting(config, "num_moe_experts")) and not _own_experts(config):
        raise SpecError(
            "model.config.num_moe_experts",
            kind="refused",
            got=f"is {experts}, and only a dense model or a class with experts can be upcycled",
            fix="give the parent's recipe. If this recipe upcycles, change its spec with use_spec(recipe, spec)",
        )
    ours = ("nemo.", "nemo_upcycle.")
    known = next((kind for kind in config.__fn_or_cls__.__mro__ if kind.__module__.startswith(ours)), object)
    family = find_nemo_module(known.__module__.rpartition(".")[2], has_experts=bool(_own_experts(config)))
    if family not in parents() and not (isinstance(family, MoeFamily) and not family.no_parent_because):
        raise SpecError(
            "model.config",
            kind="refused",
            got=f"is {config.__fn_or_cls__.__name__}, and only the families {_FAMILIES} are supported",
            fix="use a recipe of these families. For a Llama under another name, use a Llama recipe of its size",
        )


def _complete(recipe: run.Partial) -> None:
    """Add the parts that NeMo's recipes have and a bare `run.Partial` lacks: saving checkpoints and resuming."""
    resume, callbacks = default_resume(), recipe.trainer.callbacks or []
    recipe.log = setting(recipe, "log") or default_log()
    recipe.resume = setting(recipe, "resume") or resume
    for name in {*resume.__arguments__} - {*recipe.resume.__arguments__}:
        setattr(recipe.resume, name, getattr(resume, name))
    keeps = any(issubclass(callback.__fn_or_cls__, pl.callbacks.ModelCheckpoint) for callback in callbacks)
    if not keeps and recipe.log.ckpt is None and recipe.trainer.enable_checkpointing is not False:
        recipe.log.ckpt = default_log().ckpt


def _take_ours(recipe: run.Partial, name: str) -> None:
    """Replace a part's NeMo class with this package's class, unless it has been replaced; keep the part's settings.

    Raises:
        SpecError: the part has a third class.
    """
    theirs, ours = _REPLACEMENTS[name]
    part = setting(recipe, name)
    if part is None or issubclass(part.__fn_or_cls__, ours):
        return
    if part.__fn_or_cls__ is not theirs:
        raise SpecError(
            name,
            got=part.__fn_or_cls__.__name__,
            expected=f"NeMo's {theirs.__name__}",
            fix=f"use NeMo's class, or derive your class from {ours.__module__}.{ours.__name__}",
        )
    fdl.update_callable(part, ours)


def _changes(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the name and both values of every setting that differs between two configurations."""
    if not (isinstance(before, fdl.Buildable) and isinstance(after, fdl.Buildable)):
        if before != after:
            yield name, _short(before), _short(after)
        return
    if before.__fn_or_cls__ is not after.__fn_or_cls__:
        yield name, before.__fn_or_cls__.__name__, after.__fn_or_cls__.__name__
    for argument in dict.fromkeys([*before.__arguments__, *after.__arguments__]):
        inner = f"{name}.{argument}".lstrip(".")
        yield from _changes(getattr(before, argument, None), getattr(after, argument, None), inner)


def _short(value: Any) -> str:
    """Return a value on one line; a configuration shows only settings that differ from its class's defaults."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    if not isinstance(value, fdl.Buildable):
        return getattr(value, "__name__", repr(value))
    defaults = value.__signature_info__.parameters
    given = [
        f"{name}={_short(inner)}"
        for name, inner in value.__arguments__.items()
        if name not in defaults or inner != defaults[name].default
    ]
    return f"{value.__fn_or_cls__.__name__}({', '.join(given)})"
