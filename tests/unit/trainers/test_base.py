"""How a training's settings are sorted into kinds; `tests/contract` covers the parts that both trainers implement."""

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
