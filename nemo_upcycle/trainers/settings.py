"""The table of training settings: each row has NeMo's name, Bridge's name, and the meaning in this package.

For both trainers, a row says whether a result or the step-0 check depends on the setting, whether people look at the
setting, which name the planner uses for a size, and which values are valid.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.utils.validation import is_number, is_whole


class Rule(NamedTuple):
    """The values that a setting may have. The trainer decides about `None` and about settings that its class lacks."""

    allows: Callable[[Any], bool]
    expected: str
    fix: str


class Setting(NamedTuple):
    """A setting of one trainer or of both. Names that end with a dot stand for all settings that begin with them.

    Args:
        nemo: path in a NeMo recipe; empty: NeMo has no such setting.
        bridge: path in a Bridge configuration; empty: Bridge has no such setting.
        rule: valid values.
        size: name of the setting in the planner's rules.
        shown: whether people look at the setting.
        free: whether the result does not depend on the setting, so that it may change in a run that has started.
        step0: whether the step-0 check depends on the setting.
        rewind: whether the setting may change when a run is rewound, although the result depends on it.
    """

    nemo: str
    bridge: str
    rule: Rule | None = None
    size: str = ""
    shown: bool = False
    free: bool = False
    step0: bool = False
    rewind: bool = False

    def of(self, trainer: str) -> str:
        """Return the setting's name in a trainer.

        Args:
            trainer: `nemo` or `bridge`.
        """
        name: str = getattr(self, trainer)
        return name


def _from(low: int) -> Rule:
    return Rule(lambda value: is_whole(value, low), f"a whole number, {low} or more", "set it to, for example, 100")


def _one_of(*names: str) -> Rule:
    return Rule(lambda value: value in names, f"one of {', '.join(names)}", f"set it to {names[0]}")


def _finite(value: Any) -> bool:
    return is_number(value, 0) and value != math.inf


def _each_finite(value: Any) -> bool:
    return all(map(_finite, value)) if isinstance(value, list | tuple) else _finite(value)


def _strategy(name: str, size: str, *, shown: bool = False) -> Setting:
    return Setting(f"trainer.strategy.{name}", f"model.{name}", size=size, shown=shown, free=True)


def _model(name: str, rule: Rule | None = None, *, shown: bool = False, rewind: bool = False) -> Setting:
    return Setting(f"model.config.{name}", f"model.{name}", rule, shown=shown, rewind=rewind)


def _optimizer(name: str, rule: Rule, *, rewind: bool = False) -> Setting:
    return Setting(f"optim.config.{name}", f"optimizer.{name}", rule, rewind=rewind)


def _callback(nemo: str, bridge: str, rule: Rule | None = None) -> Setting:
    """Make the row of a setting that belongs to a NeMo callback (by its class) and to Bridge's node `upcycle`."""
    return Setting(f"trainer.callbacks.{nemo}", f"upcycle.{bridge}", rule, free=True)


#: A learning rate of 0 is allowed: it measures the model and changes no weight.
_RATE = Rule(_finite, "a finite number, 0 or more", "set it to, for example, 1e-5")
_RATES = _RATE._replace(allows=_each_finite)
_SHARE = Rule(
    lambda value: is_number(value, 0) and value < 1, "a number from 0 to below 1", "set it to, for example, 0.1"
)
_PART = Rule(lambda value: is_number(value, 0, 1), "a number from 0 to 1", "set it to, for example, 0.05")
_PERIOD = Rule(
    lambda value: is_whole(value, 1) or (isinstance(value, float) and 0 < value <= 1),
    "a whole number, 1 or more, or a share of the data up to 1.0",
    "set it to, for example, 100",
)
_NONE = Rule(operator.not_, "none", "leave it out: ranks fill plain tensors")
STEPS = Setting("trainer.max_steps", "train.train_iters", _from(1), shown=True)
SEQUENCE = Setting("data.seq_length", "dataset.seq_length", _from(1), "seq_length", shown=True)
MICRO_BATCH = Setting("data.micro_batch_size", "train.micro_batch_size", _from(1), "micro_batch", shown=True)
CONTEXT = _strategy("context_parallel_size", "cp", shown=True)
WARMUP = Setting("optim.lr_scheduler.warmup_steps", "scheduler.lr_warmup_iters", _from(0), shown=True)
LR = Setting("optim.config.lr", "optimizer.lr", _RATE, shown=True, rewind=True)
MIN_LR = Setting("optim.lr_scheduler.min_lr", "optimizer.min_lr", _RATE, shown=True, rewind=True)
SCHEDULE = Setting("optim.lr_scheduler.", "scheduler.", rewind=True)
AUX_LOSS = _model("moe_aux_loss_coeff", _RATES, rewind=True)
SAVE_EVERY = Setting("log.ckpt.every_n_train_steps", "checkpoint.save_interval", _from(1), shown=True, free=True)
FP8_RECIPE = Setting("trainer.plugins.fp8_recipe", "", size="precision")
SETTINGS: tuple[Setting, ...] = (
    Setting("trainer.num_nodes", "nodes", shown=True, free=True),
    Setting("trainer.devices", "ranks_per_node", shown=True, free=True),
    Setting("trainer.num_nodes x devices", "", size="gpus"),
    STEPS,
    Setting("data.global_batch_size", "train.global_batch_size", _from(1), "global_batch", shown=True),
    MICRO_BATCH,
    SEQUENCE,
    LR,
    MIN_LR,
    SCHEDULE,
    WARMUP,
    Setting("optim.lr_scheduler.constant_steps", "", _from(0)),
    Setting("", "scheduler.lr_decay_style", shown=True),
    _strategy("tensor_model_parallel_size", "tp", shown=True),
    _strategy("pipeline_model_parallel_size", "pp", shown=True),
    _strategy("virtual_pipeline_model_parallel_size", "vp", shown=True),
    CONTEXT,
    _strategy("expert_model_parallel_size", "ep", shown=True),
    _strategy("expert_tensor_parallel_size", "etp", shown=True),
    _strategy("num_layers_in_first_pipeline_stage", "first"),
    _strategy("num_layers_in_last_pipeline_stage", "last"),
    _strategy("account_for_embedding_in_pipeline_split", "embedding"),
    _strategy("account_for_loss_in_pipeline_split", "loss"),
    _strategy("tensor_model_parallel_size x context_parallel_size x pipeline_model_parallel_size", "tp x cp x pp"),
    _strategy(
        "expert_tensor_parallel_size x expert_model_parallel_size x pipeline_model_parallel_size", "etp x ep x pp"
    ),
    _strategy("sequence_parallel", "sequence_parallel"),
    Setting("trainer.strategy.ddp.check_for_nan_in_grad", "ddp.check_for_nan_in_grad", free=True),
    Setting("", "rerun_state_machine.check_for_nan_in_loss", free=True),
    Setting("trainer.strategy.ckpt_async_save", "", shown=True),
    Setting(
        "trainer.strategy.ckpt_optim_fully_reshardable", "checkpoint.dist_ckpt_optim_fully_reshardable", free=True
    ),
    # A run that is filled from a dense checkpoint refuses these settings, and the fields that
    # `models/config_fields.yaml` refuses.
    Setting("trainer.strategy.fsdp", "", _NONE),
    Setting("trainer.strategy.ddp.use_megatron_fsdp", "ddp.use_megatron_fsdp", _NONE),
    Setting("trainer.plugins.precision", "", shown=True),
    FP8_RECIPE,
    Setting("", "mixed_precision", size="precision"),
    _model("moe_expert_capacity_factor", shown=True, rewind=True),
    _model("moe_pad_expert_input_to_capacity", shown=True),
    _model("recompute_granularity", shown=True),
    _model("recompute_modules", shown=True),
    # Megatron-Core 0.15 treats any other name as if no name were set. 0.19 lists the valid names, and
    # `trial.wrong_choices` checks them.
    Setting("model.config.moe_router_dtype", "", _one_of("fp32", "fp64")),
    _model("hidden_dropout", _SHARE),
    _model("attention_dropout", _SHARE),
    AUX_LOSS,
    _model("moe_z_loss_coeff", _RATE, rewind=True),
    _model("moe_router_bias_update_rate", _RATE, rewind=True),
    Setting("", "model.moe_router_quantile_balancing_ema", _SHARE, rewind=True),
    Setting("model.config.moe_router_topk", "model.moe_router_topk", size="top_k"),
    Setting(
        "model.config.moe_router_padding_for_fp8", "model.moe_router_padding_for_quantization", size="router_padding"
    ),
    Setting("optim.config.optimizer", "", _one_of("adam", "sgd")),
    *(_optimizer(name, _RATE, rewind=True) for name in ("weight_decay", "clip_grad")),
    *(_optimizer(name, _SHARE) for name in ("adam_beta1", "adam_beta2")),
    SAVE_EVERY,
    Setting("log.ckpt.keep_last", "", _from(1), shown=True),
    Setting("log.ckpt.keep_every", "upcycle.keep_every", _from(0), shown=True, free=True),
    Setting("", "checkpoint.most_recent_k", shown=True, free=True),
    Setting("", "checkpoint.async_save", shown=True, free=True),
    Setting("", "checkpoint.save_retain_interval", free=True),
    Setting("log.", "logger.", free=True),
    Setting("trainer.log_every_n_steps", "", _from(1), free=True),
    Setting("", "logger.log_interval", _from(1)),
    Setting("trainer.val_check_interval", "", _PERIOD),
    Setting("", "validation.eval_interval", _from(0)),
    Setting("", "validation.eval_iters", _from(0)),
    Setting("trainer.accelerator", "", _one_of("gpu", "cpu", "auto", "cuda")),
    Setting("data.num_workers", "dataset.num_workers", _from(0), free=True),
    Setting("trainer.callbacks.LossGuard.", "", free=True),
    _callback("LossGuard.window", "spike_window", _from(1)),
    _callback("LossGuard.threshold", "spike_threshold", _RATE._replace(fix="set it to, for example, 8")),
    _callback("LossGuard.stop_on_spike", "stop_on_spike"),
    _callback("LossGuard.min_expert_load", "min_expert_load", _PART),
    _callback("LossGuard.max_dropped", "max_dropped", _PART),
    _callback("LossGuard.max_above_parent", "max_above_parent", _RATE._replace(fix="set it to, for example, 0.1")),
    _callback("LossGuard.limit_steps", "limit_steps", _from(1)),
    _callback("MetricsLogger.fp8_statistics_every", "fp8_statistics_every", _from(0)),
    Setting("trainer.callbacks.MetricsLogger.expert_distance_every", "", _from(1), free=True),
    _callback("EvaluateWhileTraining.every_n_steps", "evaluate_every", _from(0)),
    _callback("EvaluateWhileTraining.suite", "evaluate_suite"),
    _callback("EvaluateWhileTraining.limit", "evaluate_limit", _from(1)),
    Setting("model.", "model.", step0=True),
    Setting("resume.restore_config.spec.", "spec.", step0=True),
    Setting("", "recipe", step0=True),
)


def free_settings(trainer: str) -> tuple[str, ...]:
    """Return the names of the settings that the result of a training does not depend on."""
    return tuple(name for row in SETTINGS if row.free and (name := row.of(trainer)))


def step0_settings(trainer: str) -> tuple[str, ...]:
    """Return the names of the settings that the step-0 check depends on."""
    return tuple(name for row in SETTINGS if row.step0 and (name := row.of(trainer)))


def rewind_settings(trainer: str) -> tuple[str, ...]:
    """Return the names of the settings that may change when a run is rewound."""
    return tuple(name for row in SETTINGS if row.rewind and (name := row.of(trainer)))


def is_named(path: str, names: Iterable[str]) -> bool:
    """Return whether a setting's path is one of these names, or begins with a name that ends with a dot."""
    return any(path == name or (name.endswith(".") and path.startswith(name)) for name in names)


def sizes_of(trainer: str) -> dict[str, str]:
    """Map the planner's names of sizes to a trainer's setting names."""
    return {row.size: name for row in SETTINGS if row.size and (name := row.of(trainer))}


def shown_settings(recipe: Any, trainer: str) -> dict[str, Any]:
    """Return the values of the settings that people look at, except those that are None.

    Args:
        recipe: NeMo recipe, or Bridge configuration.
        trainer: `nemo` or `bridge`.
    """
    values = {name: setting(recipe, name) for row in SETTINGS if row.shown and (name := row.of(trainer))}
    return {name: value for name, value in values.items() if value is not None}


def check_packs(recipe: Any, trainer: str, where: str = "") -> None:
    """Check the settings that packs of conversations restrict.

    Args:
        recipe: NeMo recipe, or Bridge configuration.
        trainer: `nemo` or `bridge`.
        where: prefix of override names in error texts.

    Raises:
        SpecError: a setting does not allow packs.
    """
    for row, expected in (
        (MICRO_BATCH, "1, because a micro batch is a pack"),
        (CONTEXT, "1, because the conversations of a pack are not split over ranks"),
    ):
        if (got := setting(recipe, row.of(trainer)) or 1) != 1:
            raise SpecError(field=f"{where}{row.of(trainer)}", got=got, expected=expected, fix="set it to 1")


def check_values(recipe: Any, trainer: str, where: str = "") -> None:
    """Check the values of a training's settings; see `wrong_values`.

    Raises:
        SpecError: values are invalid; the text lists the settings.

    Example:
        >>> recipe.optim.config.lr = -1  # doctest: +SKIP
        >>> check_values(recipe, "nemo")  # doctest: +SKIP
        Traceback (most recent call last):
        nemo_upcycle.errors.SpecError: optim.config.lr: got -1, expected a finite number, 0 or more. Fix: ...
    """
    if wrong := [*wrong_values(recipe, trainer, where)]:
        raise SpecError.together(wrong)


def all_wrong(
    recipe: Any,
    trainer: str,
    where: str,
    check: Callable[[], object],
    construct: Callable[[], Iterable[UpcycleError]],
) -> list[UpcycleError]:
    """Return all errors that keep a training from its first step; construct objects only if nothing else is wrong.

    Args:
        recipe: NeMo recipe, or Bridge configuration.
        trainer: `nemo` or `bridge`.
        where: prefix of override names in error texts.
        check: function that raises an UpcycleError if something other than a setting's value is wrong.
        construct: function that constructs the same objects as the job and returns the errors.
    """
    found: list[UpcycleError] = [*wrong_values(recipe, trainer, where)]
    values = [error.field for error in found]
    try:
        check()
    except UpcycleError as error:
        found += [part for part in error.parts if part.field not in values]
    return found or [failure.renamed(lambda name: f"{where}{name}") for failure in construct()]


def wrong_values(recipe: Any, trainer: str, where: str = "") -> Iterator[SpecError]:
    """Yield an error for each setting of a training that has an invalid value.

    Args:
        recipe: NeMo recipe, or Bridge configuration.
        trainer: `nemo` or `bridge`.
        where: prefix of override names in error texts.
    """
    for row in SETTINGS:
        name, rule = row.of(trainer), row.rule
        value = setting(recipe, name)
        if rule and value is not None and not rule.allows(value):
            yield SpecError(field=f"{where}{name}", got=value, expected=rule.expected, fix=rule.fix)
    highest, lowest = LR.of(trainer), MIN_LR.of(trainer)
    rate, floor = setting(recipe, highest), setting(recipe, lowest)
    if rate is not None and floor is not None and floor > rate:  # schedulers would fail after the warm-up
        expected = f"at most {where}{highest} ({rate})"
        yield SpecError(field=f"{where}{lowest}", got=floor, expected=expected, fix="change one of them")


def check_masters(precision: Any, optimizer: Any, field: str) -> None:
    """Check that master weights are made from the filled weights, not from parameters in FP8.

    With delayed scaling, Transformer Engine's `FusedAdam` makes its own master weights from the parameters.

    Args:
        precision: NeMo's precision plugin, or Bridge's precision settings; None if there are none.
        optimizer: Megatron's `OptimizerConfig`.
        field: path of `use_precision_aware_optimizer` in the error text.

    Raises:
        SpecError: master weights would be made from parameters in FP8.
    """
    keeps_fp8 = setting(precision, "fp8_param_gather") and setting(precision, "fp8_recipe") == "delayed"
    if keeps_fp8 and setting(optimizer, "use_precision_aware_optimizer"):
        raise SpecError(
            field=field,
            got=True,
            expected="False with fp8_param_gather under delayed scaling, because the master weights would have 8 bits",
            fix=f"set {field} to False, or use another fp8_recipe",
        )


def setting(recipe: Any, name: str) -> Any:
    """Read the value of a setting by its path; None if a part of the path is missing.

    In a list, the path names an element by its class: `trainer.callbacks.MetricsLogger.gpu`.

    Example:
        >>> setting(recipe, "optim.config.lr")  # doctest: +SKIP
        3e-05
    """
    for part in filter(None, name.split(".")):
        recipe = of_class(recipe, part) if isinstance(recipe, list) else getattr(recipe, part, None)
    return recipe if name else None


def of_class(elements: list[Any], name: str) -> Any:
    """Return the first element that is an object of a class or a configuration of one; None if there is none."""
    return next((one for one in elements if class_name(one) == name), None)


def class_name(element: Any) -> str:
    """Return the class name of an object, or of the object that a configuration builds."""
    made: str = getattr(getattr(element, "__fn_or_cls__", type(element)), "__name__", "")
    return made


def by_class(values: Mapping[str, str]) -> dict[str, str]:
    """Return each setting's name with the numbers of callbacks replaced by their classes.

    Args:
        values: name -> value of every setting; the class of `callbacks.2` is the value of `callbacks.2.is`.

    Example:
        >>> by_class({"callbacks.2.is": "a.b.MetricsLogger", "callbacks.2.gpu": "h100"})
        {'callbacks.2.is': 'callbacks.MetricsLogger.is', 'callbacks.2.gpu': 'callbacks.MetricsLogger.gpu'}
    """

    def named(found: re.Match[str]) -> str:
        kind = values.get(f"{found[1]}{found[2]}.is", found[2])
        return f"{found[1]}{kind.rpartition('.')[2]}."

    return {name: re.sub(r"^(.*\bcallbacks\.)(\d+)\.", named, name) for name in values}
