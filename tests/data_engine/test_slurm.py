"""Scripts imitate possible answers of Slurm's commands. If there is a real Slurm, it also runs tasks as jobs.

With a real Slurm: SLURM_PARTITION=debug make test-in ENV=data
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.engine import supervise as engine
from nemo_upcycle.data.engine.pipelines import EngineStage, RunOn, executor, stages
from nemo_upcycle.data.engine.tasks import EnginePlan, load_plan
from tests.data_engine.blend import MINHASH, blend
from tests.data_engine.runs import Slurm, clear, command, everything, run
from tests.waiting import HANG_S, wait_until


_CONTACT = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setattr(engine, "_SLURM_POLL_S", 0.05)
    monkeypatch.setattr(engine, "_PATIENCE_S", 0.1)
    return Slurm(tmp_path / "bin", monkeypatch)


def _launch(folder: Path, tasks: int, **site: Any) -> tuple[EnginePlan, Any]:
    plan = load_plan(blend(folder).resolve())
    stage = EngineStage("3_write", stages(plan, "tokenizers")[-1].pipeline, tasks)
    return plan, executor(plan, stage, RunOn(slurm="any", **site))


def _jobs(plan: EnginePlan) -> Path:
    return plan.folder / "logs" / "slurm_jobs.json"


def test_jobs_are_written_down_one_by_one(tmp_path: Path, slurm: Slurm) -> None:
    slurm.says("sbatch", '[ "$calls" = 3 ] && exit 1; echo "Submitted batch job $calls"')
    plan, runs = _launch(tmp_path, 2500)
    with pytest.raises(subprocess.CalledProcessError):
        runs.run()
    assert json.loads(_jobs(plan).read_text(encoding="utf-8")) == ["1", "2"]


def test_jobs_have_the_options_of_the_site(tmp_path: Path, slurm: Slurm) -> None:
    slurm.says("sbatch", 'echo "Submitted batch job 17"')
    plan, runs = _launch(
        tmp_path,
        1,
        sbatch={"account": "me", "qos": "low"},
        srun=("--no-container-mount-home", "--container-mounts=/a b:/a b"),
        task_python="/env/bin/python",
    )
    runs.run()
    script = (plan.folder / "logs" / "3_write" / "launch_script.slurm").read_text(encoding="utf-8").splitlines()
    assert {"#SBATCH --account=me", "#SBATCH --qos=low", "#SBATCH --partition=any"} <= set(script)
    command = "srun --no-container-mount-home '--container-mounts=/a b:/a b' "
    assert script[-1].startswith(command)
    assert f" /env/bin/launch_pickled_pipeline {plan.folder}/logs/3_write/executor.pik" in script[-1]


def test_queue_that_does_not_answer_says_nothing(tmp_path: Path, slurm: Slurm) -> None:
    slurm.says("sbatch", 'echo "Submitted batch job 17"')
    plan, runs = _launch(tmp_path, 1)
    done = plan.folder / "logs" / "3_write" / "completions"
    complete = f"mkdir -p {done}; touch {done}/00000"
    slurm.says("squeue", f'[ "$calls" = 9 ] && {{ {complete}; exit 0; }}; {_CONTACT}')
    runs.run()
    engine._wait_for_slurm(plan, runs)
    assert runs.get_incomplete_ranks(skip_completed=True) == []
    assert slurm.calls("squeue") == ["-h -j 17"] * 9
    assert not _jobs(plan).exists()


@pytest.mark.parametrize("gone", ["exit 0", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"])
def test_lost_jobs_stay_on_record(tmp_path: Path, slurm: Slurm, gone: str) -> None:
    slurm.says("sbatch", 'echo "Submitted batch job 17"')
    slurm.says("squeue", f'[ "$calls" -le 3 ] && {{ echo "17_0 any"; exit 0; }}; {gone}')
    plan, runs = _launch(tmp_path, 1)
    runs.run()
    engine._wait_for_slurm(plan, runs)
    assert len(slurm.calls("squeue")) == 5
    assert json.loads(_jobs(plan).read_text(encoding="utf-8")) == ["17"]


def test_jobs_that_cannot_be_cancelled_are_not_forgotten(tmp_path: Path, slurm: Slurm) -> None:
    plan = blend(tmp_path)
    jobs = plan.parent / "logs" / "slurm_jobs.json"
    jobs.parent.mkdir()
    jobs.write_text('["17"]', encoding="utf-8")
    slurm.says("scancel", _CONTACT)
    refused = run(plan)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "Slurm did not cancel the jobs of an earlier run: 17" in refused.stderr
    slurm.says("scancel", "exit 0")
    assert run(plan).returncode == 0
    assert slurm.calls("scancel") == ["17"] * 2
    assert not jobs.exists()


def _has_slurm() -> bool:
    return bool(shutil.which("sinfo")) and not subprocess.run(["sinfo"], capture_output=True, check=False).returncode


needs_slurm = pytest.mark.skipif(not _has_slurm(), reason="no Slurm")
PARTITION = os.environ.get("SLURM_PARTITION", "batch")


@needs_slurm
@pytest.mark.slow
def test_same_bytes_as_on_one_machine(tmp_path: Path) -> None:
    plan = blend(tmp_path, finders=2, heldout_overlap=0.5, near_duplicates=MINHASH)
    site = ("--sbatch=account=me", "--srun=--kill-on-bad-exit=1", f"--task-python={sys.executable}")
    done = run(plan, "--slurm", PARTITION, "--workers", "2", "--time", "00:10:00", *site)
    assert done.returncode == 0, done.stderr
    found = everything(plan.parent)
    clear(plan)
    assert run(plan).returncode == 0
    assert everything(plan.parent) == found


@needs_slurm
@pytest.mark.slow
def test_stopping_cancels_the_jobs(tmp_path: Path) -> None:
    plan = blend(tmp_path)
    process = subprocess.Popen(command(plan, "--slurm", PARTITION), stderr=subprocess.PIPE, text=True)
    jobs = plan.parent / "logs" / "slurm_jobs.json"
    wait_until(jobs.exists, process)
    numbers = json.loads(jobs.read_text(encoding="utf-8"))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=HANG_S)
    assert (process.returncode, said.strip()) == (128 + signal.SIGTERM, "stopped; what is finished is kept")
    assert numbers

    def none_is_queued() -> bool:
        queue = subprocess.run(["squeue", "--noheader", "-o", "%A"], capture_output=True, text=True, check=True).stdout
        return not set(numbers) & set(queue.split())

    wait_until(none_is_queued)
