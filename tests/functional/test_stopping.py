"""A scheduler's SIGTERM reaches every process of a job: the training saves, and its loaders of data last that long."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.sources.checkpoints import newest_checkpoint, steps_in
from tests.functional.stages import run_in_own_process
from tests.functional.started import start_training
from tests.functional.tiny import shrink, write_finished_inputs
from tests.waiting import HANG_S


pytestmark = [pytest.mark.slow, pytest.mark.full]


def _plan(folder: Path) -> RunPlan:
    import nemo_run as run

    from nemo_upcycle.recipes import smollm2_135m_e8t2
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.stopping import SaveOnSignal

    write_finished_inputs(folder)
    recipe = shrink(smollm2_135m_e8t2.pretrain_recipe(), max_steps=2000, checkpoint_every=1000)
    recipe.data.num_workers = 2
    recipe.trainer.callbacks.insert(0, run.Config(SaveOnSignal))
    inputs = [str(folder / name) for name in ("parent", "blend", "evaluation.yaml")]
    return RunPlan("tiny", *inputs, dump_recipe(recipe), None)


def test_a_training_with_loaders_saves_when_the_whole_job_is_told_to_stop(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _plan(tmp_path).write(run_dir)
    for name in ("import", "data", "upcycle"):
        assert run_in_own_process(name, run_dir).status == 0
    job = start_training(run_dir, until_step=3)
    os.killpg(job.pid, signal.SIGTERM)
    _, said = job.communicate(timeout=HANG_S)
    assert job.returncode == 75, said
    kept = newest_checkpoint(run_dir / "pretrain/checkpoints")
    assert kept is not None
    assert f"stage 'pretrain' stopped early: {steps_in(kept)} of 2000 steps are kept" in said
