"""Which settings of a training may change in a run that has started."""

from __future__ import annotations

from nemo_upcycle.trainers.base import TrainingSettings


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


def test_what_changes_the_weights_of_a_recipe_is_fixed() -> None:
    from nemo_upcycle.recipes import llama3_8b_e8t2
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    found = NeMoTraining(dump_recipe(llama3_8b_e8t2.pretrain_recipe())).settings()
    assert found.steps == 23_842
    assert found.free.keys() >= {"log.ckpt.every_n_train_steps", "log.ckpt.keep_last", "trainer.num_nodes"}
    assert found.fixed.keys() >= {
        "data.seq_length",
        "data.global_batch_size",
        "optim.config.lr",
        "optim.lr_scheduler.warmup_steps",
        "model.config.moe_router_topk",
        "resume.restore_config.spec.seed",
        "trainer.plugins.precision",
    }
    assert not found.fixed.keys() & found.free.keys()
    assert found.step0.keys() <= found.fixed.keys()
