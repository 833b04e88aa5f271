"""Impossible values are refused with the setting's path, under NeMo's name and under Bridge's."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.base import TrainingSettings
from nemo_upcycle.trainers.settings import (
    SETTINGS,
    Setting,
    check_masters,
    check_values,
    free_settings,
    setting,
    sizes_of,
    step0_settings,
)


def _with(**values: Any) -> SimpleNamespace:
    """Return a configuration with these settings; `__` in a name stands for a dot."""
    root = SimpleNamespace()
    for path, value in values.items():
        *owners, name = path.split("__")
        at = root
        for owner in owners:
            at = vars(at).setdefault(owner, SimpleNamespace())
        setattr(at, name, value)
    return root


TRAINERS = ("nemo", "bridge")
RULED = [(row, trainer) for row in SETTINGS for trainer in TRAINERS if row.rule and row.of(trainer)]


@pytest.mark.parametrize(("row", "trainer"), RULED, ids=lambda one: one if isinstance(one, str) else one.nemo)
def test_every_rule_refuses_by_the_settings_path(row: Setting, trainer: str) -> None:
    path, value = row.of(trainer), True if row.rule and row.rule.expected == "none" else -1
    with pytest.raises(SpecError) as caught:
        check_values(_with(**{path.replace(".", "__"): value}), trainer, "pretrain.")
    assert (caught.value.field, caught.value.got) == (f"pretrain.{path}", value)
    check_values(_with(**{path.replace(".", "__"): None}), trainer)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_row_has_one_kind_and_unique_names(trainer: str) -> None:
    names = [name for row in SETTINGS if (name := row.of(trainer))]
    assert sorted(names) == sorted({*names})
    assert not {*free_settings(trainer)} & {*step0_settings(trainer)}
    assert {"tp", "pp", "vp", "cp", "ep", "etp", "seq_length", "micro_batch", "precision"} <= set(sizes_of(trainer))


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, "high", True])
def test_a_learning_rate_is_a_finite_number(value: Any) -> None:
    with pytest.raises(SpecError, match=r"optim\.config\.lr"):
        check_values(_with(optim__config__lr=value), "nemo")


def test_allows_a_zero_learning_rate_and_lists_of_coefficients() -> None:
    rates = {"optim__config__lr": 0.0, "optim__lr_scheduler__min_lr": 0.0}
    check_values(_with(**rates, model__config__moe_aux_loss_coeff=[0.01, 0.0]), "nemo")
    with pytest.raises(SpecError, match="moe_aux_loss_coeff"):
        check_values(_with(model__config__moe_aux_loss_coeff=[0.01, -1]), "nemo")


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, True),
        ({"fp8_recipe": "tensorwise"}, False),
        ({"fp8_param_gather": False}, False),
        ({"use_precision_aware_optimizer": False}, False),
    ],
    ids=str,
)
def test_master_weights_may_not_be_made_of_parameters_in_fp8(changes: dict[str, Any], refused: bool) -> None:
    values = {"fp8_param_gather": True, "fp8_recipe": "delayed", "use_precision_aware_optimizer": True} | changes
    both = SimpleNamespace(**values)
    with pytest.raises(SpecError, match=r"optim\.precise is True") if refused else nullcontext():
        check_masters(both, both, "optim.precise")
    check_masters(None, both, "optim.precise")


@pytest.mark.parametrize("row", [row for row in SETTINGS if row.rule and row.nemo], ids=lambda row: row.nemo)
def test_every_rule_of_nemo_names_an_existing_setting(row: Setting) -> None:
    import nemo_run as run

    from nemo_upcycle.recipes import llama3_8b_e8t2, llama3_8b_e8t2_sft
    from nemo_upcycle.trainers.nemo.evaluating import EvaluateWhileTraining

    owner, _, name = row.nemo.rpartition(".")
    recipes = [llama3_8b_e8t2.pretrain_recipe(), llama3_8b_e8t2_sft.finetune_recipe()]
    recipes[0].trainer.callbacks.append(run.Config(EvaluateWhileTraining))  # as a user would add it
    found = [setting(recipe, owner) for recipe in recipes]
    assert any(name in {*one.__signature_info__.parameters, *one.__arguments__} for one in found)


class MetricsLogger(SimpleNamespace):
    """A class with a name that the table of settings knows."""


def test_a_callbacks_setting_is_found_by_its_class() -> None:
    callbacks = [SimpleNamespace(fp8_statistics_every=1), MetricsLogger(fp8_statistics_every=7)]
    recipe = _with(trainer__callbacks=callbacks)
    assert setting(recipe, "trainer.callbacks.MetricsLogger.fp8_statistics_every") == 7
    assert setting(recipe, "trainer.callbacks.LossGuard.window") is None
    callbacks[1].fp8_statistics_every = -1
    with pytest.raises(SpecError, match=r"^pretrain\.trainer\.callbacks\.MetricsLogger\.fp8_statistics_every is -1"):
        check_values(recipe, "nemo", "pretrain.")


def test_a_callbacks_setting_is_free_whatever_its_place() -> None:
    values = {
        "trainer.callbacks.2.is": "nemo_upcycle.trainers.nemo.metrics.MetricsLogger",
        "trainer.callbacks.2.fp8_statistics_every": "7",
        "trainer.callbacks.3.is": "mine.Other",
        "trainer.callbacks.3.fp8_statistics_every": "7",
    }
    steps, free, step0 = "trainer.max_steps", free_settings("nemo"), step0_settings("nemo")
    sorted_values = TrainingSettings.sorted_by(values, steps=steps, free=free, step0=step0)
    assert sorted_values.free == {"trainer.callbacks.2.fp8_statistics_every": "7"}
    assert "trainer.callbacks.3.fp8_statistics_every" in sorted_values.fixed
