"""Values of settings that make no sense, refused before anything is written: one table for NeMo and Bridge."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from nemo_upcycle.errors import SpecError
from nemo_upcycle.utils.validation import is_number, is_whole


class Rule(NamedTuple):
    """What a setting may be; `None`, or a setting that the trainer's class does not have, is left to the trainer."""

    nemo: str
    bridge: str
    allows: Callable[[Any], bool]
    expected: str
    fix: str


def _from(low: int) -> tuple[Callable[[Any], bool], str, str]:
    return lambda value: is_whole(value, low), f"a whole number from {low} on", "set it to, for example, 100"


def _finite(value: Any) -> bool:
    return is_number(value, 0) and value != math.inf


def _each_finite(value: Any) -> bool:
    return all(map(_finite, value)) if isinstance(value, list | tuple) else _finite(value)


#: A learning rate of 0 is allowed: it measures, and keeps every weight.
_RATE = _finite, "a finite number, 0 or more", "set it to, for example, 1e-5"
_SHARE = (lambda value: is_number(value, 0) and value < 1), "a number from 0 to below 1", "set it to, for example, 0.1"
_NONE = operator.not_, "none"
_LR = Rule("optim.config.lr", "optimizer.lr", *_RATE)
_MIN_LR = Rule("optim.lr_scheduler.min_lr", "optimizer.min_lr", *_RATE)
RULES: tuple[Rule, ...] = (
    Rule("trainer.max_steps", "train.train_iters", *_from(1)),
    Rule("data.seq_length", "dataset.seq_length", *_from(1)),
    Rule("data.micro_batch_size", "train.micro_batch_size", *_from(1)),
    Rule("data.global_batch_size", "train.global_batch_size", *_from(1)),
    Rule("data.num_workers", "dataset.num_workers", *_from(0)),
    Rule("data.teacher_weight", "upcycle.teacher_weight", *_RATE[:2], "set it to, for example, 1.0; 0 for no teacher"),
    Rule(
        "data.teacher_temperature",
        "upcycle.teacher_temperature",
        lambda value: _finite(value) and value > 0,
        "a finite number above 0",
        "set it to, for example, 1.0",
    ),
    _LR,
    _MIN_LR,
    Rule("optim.lr_scheduler.warmup_steps", "scheduler.lr_warmup_iters", *_from(0)),
    Rule("optim.lr_scheduler.constant_steps", "", *_from(0)),
    Rule("optim.config.weight_decay", "optimizer.weight_decay", *_RATE),
    Rule("optim.config.clip_grad", "optimizer.clip_grad", *_RATE),
    Rule("optim.config.adam_beta1", "optimizer.adam_beta1", *_SHARE),
    Rule("optim.config.adam_beta2", "optimizer.adam_beta2", *_SHARE),
    Rule("model.config.hidden_dropout", "model.hidden_dropout", *_SHARE),
    Rule("model.config.attention_dropout", "model.attention_dropout", *_SHARE),
    Rule("model.config.moe_aux_loss_coeff", "model.moe_aux_loss_coeff", _each_finite, *_RATE[1:]),
    Rule("model.config.moe_z_loss_coeff", "model.moe_z_loss_coeff", *_RATE),
    Rule("model.config.moe_router_bias_update_rate", "model.moe_router_bias_update_rate", *_RATE),
    Rule("", "model.moe_router_quantile_balancing_ema", *_SHARE),
    Rule("log.ckpt.every_n_train_steps", "checkpoint.save_interval", *_from(1)),
    Rule("log.ckpt.keep_last", "", *_from(1)),
    # What a run that is filled from a dense checkpoint cannot have beside `models/config_fields.yaml`.
    Rule("trainer.strategy.fsdp", "", *_NONE, "leave it out: ranks fill plain tensors"),
    Rule(
        "trainer.strategy.ddp.use_megatron_fsdp",
        "ddp.use_megatron_fsdp",
        *_NONE,
        "leave it out: ranks fill plain tensors",
    ),
)


def check_packs(recipe: Any, micro_batch_size: str, context_parallel_size: str, where: str = "") -> None:
    """Check what packs of conversations ask of a training.

    Args:
        recipe: NeMo's recipe, or Bridge's configuration.
        micro_batch_size: the name of this setting.
        context_parallel_size: of this one.
        where: prefix of its overrides, for the text of errors.

    Raises:
        SpecError: a setting does not fit.
    """
    for name, expected in (
        (micro_batch_size, "1: a micro batch is a pack"),
        (context_parallel_size, "1: the conversations of a pack are not cut for several ranks"),
    ):
        if (got := setting(recipe, name) or 1) != 1:
            raise SpecError(field=f"{where}{name}", got=got, expected=expected, fix="set it to 1")


def check_values(recipe: Any, trainer: str, where: str = "") -> None:
    """Check the values of a training's settings, one by one.

    Args:
        recipe: NeMo's recipe, or Bridge's configuration.
        trainer: `nemo` or `bridge`.
        where: prefix of its overrides, for the text of errors.

    Raises:
        SpecError: a value makes no sense; the text names the setting.

    Example:
        >>> recipe.optim.config.lr = -1  # doctest: +SKIP
        >>> check_values(recipe, "nemo")  # doctest: +SKIP
        Traceback (most recent call last):
        nemo_upcycle.errors.SpecError: optim.config.lr: got -1, expected a finite number, 0 or more. Fix: ...
    """
    for rule in RULES:
        name = getattr(rule, trainer)
        value = setting(recipe, name)
        if value is not None and not rule.allows(value):
            raise SpecError(field=f"{where}{name}", got=value, expected=rule.expected, fix=rule.fix)
    highest, lowest = getattr(_LR, trainer), getattr(_MIN_LR, trainer)
    rate, floor = setting(recipe, highest), setting(recipe, lowest)
    if rate is not None and floor is not None and floor > rate:  # schedulers fail after the warm-up
        expected = f"at most {where}{highest} ({rate})"
        raise SpecError(field=f"{where}{lowest}", got=floor, expected=expected, fix="set both")


def check_masters(precision: Any, optimizer: Any, field: str) -> None:
    """Check that master weights are made of what is filled in, not of parameters in FP8.

    With delayed scaling, Transformer Engine's `FusedAdam` makes its own of the parameters.

    Args:
        precision: of NeMo's plugin, or Bridge's; None: there is none.
        optimizer: Megatron's `OptimizerConfig`.
        field: that of `use_precision_aware_optimizer`, for the text of the error.

    Raises:
        SpecError: they are made of parameters in FP8.
    """
    keeps_fp8 = setting(precision, "fp8_param_gather") and setting(precision, "fp8_recipe") == "delayed"
    if keeps_fp8 and setting(optimizer, "use_precision_aware_optimizer"):
        raise SpecError(
            field=field,
            got=True,
            expected="False with fp8_param_gather under delayed scaling: its master weights would be of 8 bits",
            fix="set it to False, or use another fp8_recipe",
        )


def setting(recipe: Any, name: str) -> Any:
    """Return the value of a setting by its path; None where something on the way is not there.

    Example:
        >>> setting(recipe, "optim.config.lr")  # doctest: +SKIP
        3e-05
    """
    for part in filter(None, name.split(".")):
        recipe = getattr(recipe, part, None)
    return recipe if name else None
