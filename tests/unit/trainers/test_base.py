"""How settings of a training are told apart; `tests/contract` has what both trainers fill in."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning.recipe_table import bridge_recipes
from nemo_upcycle.trainers.base import Training, TrainingSettings
from nemo_upcycle.trainers.bridge.training import BridgeTraining


def test_settings_are_told_apart_by_their_whole_names() -> None:
    values = {
        "trainer.max_steps": "100",
        "log.ckpt.keep_last": "2",
        "data.num_workers": "8",
        "data.num_workers_seed": "1",
        "logits": "16",
        "model.config.num_layers": "2",
    }
    found = TrainingSettings.sorted_by(
        values, steps="trainer.max_steps", free=("log.", "data.num_workers"), step0=("model.",)
    )
    assert found.steps == 100
    assert found.free == {"log.ckpt.keep_last": "2", "data.num_workers": "8"}
    assert found.step0 == {"model.config.num_layers": "2"}
    assert found.fixed == {"data.num_workers_seed": "1", "logits": "16", "model.config.num_layers": "2"}


def _nemo_taught(weight: float) -> Training:
    from nemo_upcycle.recipes import llama3_8b_e8t2_sft
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    recipe = llama3_8b_e8t2_sft.finetune_recipe()
    recipe.data.__arguments__["teacher_weight"] = weight
    return NeMoTraining.from_text(dump_recipe(recipe))


def _bridge_taught(weight: float) -> Training:
    words = ("optimizer.lr=1e-5", f"upcycle.teacher_weight={weight}")
    return BridgeTraining.from_text(BridgeTraining(bridge_recipes()["llama3_8b_e8t2"], words).to_text())


@pytest.mark.parametrize("make", [_nemo_taught, _bridge_taught])
def test_a_plan_with_an_earlier_releases_teacher_is_read_where_that_had_no_weight(
    make: Callable[[float], Training],
) -> None:
    assert not any("teacher" in name for name in make(0.0).named_settings())
    with pytest.raises(SpecError) as refused:
        make(1.0).named_settings()
    assert refused.value.field.endswith("teacher_weight")
