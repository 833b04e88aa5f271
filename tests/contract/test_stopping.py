"""A scheduler's SIGTERM reaches every process of a job: the training saves, and its loaders of data last that long."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nemo_upcycle.sources.checkpoints import newest_checkpoint, steps_in
from tests.contract.trainers import IS_BRIDGE, metrics, training_text, write_plan
from tests.functional.stages import run_stages
from tests.functional.started import start_training
from tests.functional.tiny import write_finished_inputs
from tests.waiting import HANG_S


pytestmark = [pytest.mark.slow, pytest.mark.full]
WITH_LOADERS = (
    {"train.exit_signal_handler": "true", "dataset.num_workers": 2, "validation.eval_iters": 0}
    if IS_BRIDGE
    else {"data.num_workers": 2, "trainer.limit_val_batches": 0, "trainer.val_check_interval": 1}
)


def _text() -> str:
    text = training_text({"steps": 350, "save_every": 1000} | WITH_LOADERS)
    if IS_BRIDGE:
        return text
    import nemo_run as run

    from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe
    from nemo_upcycle.trainers.nemo.stopping import SaveOnSignal

    recipe = load_recipe(text)
    recipe.trainer.callbacks.insert(0, run.Config(SaveOnSignal))
    return dump_recipe(recipe)


def test_a_training_with_loaders_saves_when_the_whole_job_is_told_to_stop_and_goes_on(tmp_path: Path) -> None:
    inputs, run_dir = write_finished_inputs(tmp_path), tmp_path / "run"
    write_plan(run_dir, *(inputs / name for name in ("parent", "blend", "evaluation.yaml")), _text())
    run_stages(run_dir, ("import", "data", "upcycle"))
    job = start_training(run_dir, until_step=3)
    os.killpg(job.pid, signal.SIGTERM)
    _, said = job.communicate(timeout=HANG_S)
    assert job.returncode == 75, said
    kept = newest_checkpoint(run_dir / "pretrain/checkpoints")
    assert kept is not None
    assert f"stage 'pretrain' stopped early: {steps_in(kept)} of 350 steps are kept" in said
    assert "Traceback" not in said

    again = start_training(run_dir, until_step=steps_in(kept) + 3)
    os.killpg(again.pid, signal.SIGKILL)
    again.communicate()
    steps = [line["step"] for line in metrics(run_dir / "pretrain")]
    assert steps == list(range(1, len(steps) + 1))
