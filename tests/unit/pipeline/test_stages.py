"""A training stage is done when its last step is saved, however its process ended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.errors import StageError, StageStopped, UpcycleError
from nemo_upcycle.trainers.nemo import training as nemo_training
from tests.unit.sources.test_checkpoints import write


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs the stage with a training that saves the given steps and ends in the given way."""

    def run(steps: list[int], ending: BaseException | None) -> dict[str, Any]:
        def training() -> None:
            for step in steps:
                write(tmp_path / "pretrain" / "checkpoints", step)
            if ending:
                raise ending

        resume = SimpleNamespace(restore_config=SimpleNamespace(spec=None))
        recipe = SimpleNamespace(trainer=SimpleNamespace(max_steps=10), resume=resume)
        monkeypatch.setattr(nemo_training, "load_recipe", lambda text: recipe)
        monkeypatch.setattr(nemo_training, "place_recipe", lambda *_: None)
        monkeypatch.setattr("nemo_upcycle.cpu.backend.use_cpu_backend", lambda: True)
        # Otherwise the training silences NeMo for the tests that follow.
        monkeypatch.setattr(nemo_training, "is_verbose", lambda: True)
        monkeypatch.setattr("fiddle.build", lambda config: training if config is recipe else config)
        return nemo_training.NeMoTraining("text").train(tmp_path / "pretrain", tmp_path, tmp_path)

    return run


@pytest.mark.parametrize("ending", [None, SystemExit(0), SystemExit(75)], ids=["itself", "0", "75"])
def test_only_the_last_step_means_done(train: Any, ending: BaseException | None) -> None:
    with pytest.raises(StageStopped, match=r"'pretrain' stopped early: 5 of 10 steps are kept") as caught:
        train([4], ending)
    assert not isinstance(caught.value, UpcycleError)
    assert train([9], ending)["checkpoint"].endswith("step=9-last")


def test_no_checkpoint_is_an_error_unless_stopped(train: Any) -> None:
    with pytest.raises(StageError, match="has no finished checkpoint"):
        train([], None)
    with pytest.raises(StageStopped, match="0 of 10 steps"):
        train([], SystemExit(0))
