"""What the contract of a training says of its settings, filled by both trainers."""

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


def _nemo() -> Training:
    from nemo_upcycle.recipes import llama3_8b_e8t2
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    return NeMoTraining(dump_recipe(llama3_8b_e8t2.pretrain_recipe()))


def _bridge() -> Training:
    """A training whose overrides name what is asked for below; Bridge need not be installed."""
    words = ("train.train_iters=23842", "checkpoint.save_interval=5", "logger.log_interval=1", "optimizer.lr=1e-5")
    name = bridge_recipes()["llama3_8b_e8t2"]
    return BridgeTraining(name, (*words, "model.moe_router_topk=2"), 64, 8, changes='{"seed": 7}')


#: The trainer's training of Llama 3 8B -> settings that are free, and others that are fixed, some of step 0.
CONTRACT = {
    _nemo: (
        {"log.ckpt.every_n_train_steps", "log.ckpt.keep_last", "trainer.num_nodes"},
        {"data.seq_length", "data.global_batch_size", "optim.config.lr", "optim.lr_scheduler.warmup_steps"}
        | {"trainer.plugins.precision"},
        {"model.config.moe_router_topk", "resume.restore_config.spec.seed"},
    ),
    _bridge: (
        {"checkpoint.save_interval", "logger.log_interval", "nodes", "ranks_per_node"},
        {"optimizer.lr"},
        {"model.moe_router_topk", "spec.seed", "recipe"},
    ),
}


@pytest.mark.parametrize("make", CONTRACT, ids=lambda make: make.__name__)
def test_what_changes_the_weights_of_a_training_is_fixed(make: Callable[[], Training]) -> None:
    training = make()
    found, (free, fixed, step0) = training.settings(), CONTRACT[make]
    assert found.steps == 23_842
    assert found.free.keys() >= free
    assert found.fixed.keys() >= fixed | step0
    assert found.step0.keys() >= step0
    assert not found.step0.keys() & fixed
    assert not found.fixed.keys() & found.free.keys()
    assert found.step0.keys() <= found.fixed.keys()
    assert training.ranks == (64, 8)
    assert not training.reads_chat


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
