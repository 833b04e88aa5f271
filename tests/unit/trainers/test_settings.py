"""Values that make no sense are refused by the setting's path, in NeMo's words and in Bridge's."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
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
    """Return a configuration with these settings; `__` stands for the dot."""
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
def test_a_row_is_of_one_kind_and_its_names_are_once_there(trainer: str) -> None:
    names = [name for row in SETTINGS if (name := row.of(trainer))]
    assert sorted(names) == sorted({*names})
    assert not {*free_settings(trainer)} & {*step0_settings(trainer)}
    assert {"tp", "pp", "vp", "cp", "ep", "etp", "seq_length", "micro_batch", "precision"} <= set(sizes_of(trainer))


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, "high", True])
def test_a_learning_rate_is_a_finite_number(value: Any) -> None:
    with pytest.raises(SpecError, match=r"optim\.config\.lr"):
        check_values(_with(optim__config__lr=value), "nemo")


def test_a_learning_rate_of_zero_and_a_list_of_coefficients_are_allowed() -> None:
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
    with pytest.raises(SpecError, match=r"optim\.precise: got True") if refused else nullcontext():
        check_masters(both, both, "optim.precise")
    check_masters(None, both, "optim.precise")


@pytest.mark.parametrize("row", [row for row in SETTINGS if row.rule and row.nemo], ids=lambda row: row.nemo)
def test_every_rule_of_nemo_is_about_a_setting_that_a_recipe_has(row: Setting) -> None:
    from nemo_upcycle.recipes import llama3_8b_e8t2, llama3_8b_e8t2_sft

    owner, _, name = row.nemo.rpartition(".")
    found = [setting(make(), owner) for make in (llama3_8b_e8t2.pretrain_recipe, llama3_8b_e8t2_sft.finetune_recipe)]
    assert any(name in {*one.__signature_info__.parameters, *one.__arguments__} for one in found)
