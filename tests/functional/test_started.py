"""A small run that an earlier release finished is resumed with more steps, then exported, evaluated and reported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_upcycle.pipeline import launch
from nemo_upcycle.pipeline.checks import check_started
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.order import finished, read_plan
from nemo_upcycle.pipeline.stage_jobs import jobs_of
from nemo_upcycle.pipeline.stages import STAGES, RunPlan
from nemo_upcycle.utils.files import read_json
from tests.functional.stages import run_in_own_process
from tests.started import PACKED, unpack


pytestmark = [pytest.mark.slow, pytest.mark.full]
HERE = SimpleNamespace(executor=None, detach=False, confirm=lambda: True)


def _run_stages(jobs: Sequence[Job], run_dir: Path, *_: object) -> None:
    """Run each stage in a process that has already imported NeMo."""
    for job in jobs:
        answer = run_in_own_process(job.name, run_dir)
        sys.stderr.write(answer.text)
        assert answer.status == 0


@pytest.mark.parametrize("release", PACKED)
def test_a_run_of_an_earlier_release_goes_on(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe

    run_dir = unpack(release, tmp_path)
    plan = read_plan(run_dir)
    assert isinstance(plan, RunPlan)
    recipe = load_recipe(plan.pretrain)
    recipe.trainer.max_steps = 6
    (run_dir / "import/_SUCCESS.json").write_text("{")
    plan = replace(plan, pretrain=dump_recipe(recipe))
    check_started(run_dir, plan)
    monkeypatch.setattr(launch, "run_stages", _run_stages)
    launch.launch(HERE, run_dir, plan, jobs_of(STAGES, run_dir, plan))
    said = capsys.readouterr().err
    ran = [stage.name for stage in STAGES if f"[{stage.name}] done in" in said]
    assert ran == ["import", "pretrain", "export", "evaluate", "report"]
    assert "\nstep 5/6 " in said
    assert "\nstep 4/6 " not in said
    assert finished(run_dir, plan) == [stage.name for stage in STAGES]
    assert read_json(run_dir / "results.json")["training"]["pretrain"]["steps"] == 6
