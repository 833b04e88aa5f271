"""Jobs of a real Slurm whose ranks are shell commands: the environment of a rank, and what happens when a rank ends.

`make test-in ENV=slurm` runs both of these commands:

    scripts/slurm_cluster.sh start
    python -m pytest tests/functional/test_slurm_jobs.py
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_upcycle.errors import UnfinishedError
from nemo_upcycle.pipeline import chain as chain_module
from nemo_upcycle.pipeline.chain import Chain
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.local import StopSignals
from nemo_upcycle.pipeline.executors.slurm import SlurmScheduler, StagedSlurmExecutor
from nemo_upcycle.utils.files import MARKER
from tests.functional.test_slurm import has_test_cluster
from tests.waiting import wait_until


pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(not has_test_cluster(), reason="no Slurm: scripts/slurm_cluster.sh start"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "POLL_S", 0.5)
    monkeypatch.setattr(SlurmScheduler, "poll_s", 2.0)
    monkeypatch.setattr(chain_module, "SETTLE_S", 5.0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run's folder; its jobs are cancelled at the end."""
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    subprocess.run(["scancel", "--user=root"], check=False)


def chain_of(run_dir: Path, commands: dict[str, str], **settings: object) -> Chain:
    """Return a chain in which each stage needs the previous one; a stage is done when its marker exists."""
    stages = settings.pop("stages", {})
    executor = StagedSlurmExecutor(
        account="root", partition="batch", mem="100", time="00:05:00", stages=stages, python="bash", **settings
    )
    names, jobs = list(commands), []
    for number, (name, text) in enumerate(commands.items()):
        (run_dir / name).mkdir(exist_ok=True)
        after = tuple(names[max(0, number - 1) : number])
        jobs.append(Job(name, run_dir, ("bash", "-c", text.format(done=f"touch {run_dir / name / MARKER}")), after))
    return Chain(SlurmScheduler(executor), jobs, lambda name: (run_dir / name / MARKER).is_file(), run_dir)


def finish(chain: Chain) -> None:
    """Check the chain, submit it, and watch it until it is done."""
    chain.check()
    chain.submit()
    with StopSignals() as stop:
        assert chain.watch(stop)


def test_rank_that_crashes_after_its_marker_fails_nothing(run_dir: Path) -> None:
    finish(chain_of(run_dir, {"import": "{done}; kill -SEGV $$", "data": "{done}; exit 139", "upcycle": "{done}"}))


def test_stage_that_ends_within_kill_wait_fails_nothing(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    late = 'trap "{done}; exit 0" TERM; while :; do sleep 1; done'
    commands = {"import": late, "data": "{done}", "upcycle": "{done}", "export": "{done}"}
    finish(chain_of(run_dir, commands, stages={"import": {"time": "00:01:00"}}))
    assert "DependencyNeverSatisfied" in capfd.readouterr().err


def test_the_message_has_slurms_reason_for_an_end(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnfinishedError) as caught:
        finish(chain_of(run_dir, {"import": "sleep 600"}, stages={"import": {"time": "00:01:00"}}))
    assert "DUE TO TIME LIMIT" in str(caught.value)
    shown = capfd.readouterr().err
    assert "DUE TO TIME LIMIT" in shown
    assert "+ mkdir" not in shown  # the script itself is not shown


@pytest.mark.parametrize("caller", [{"SBATCH_EXPORT": "NONE"}, {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "100"}])
def test_variables_reach_the_ranks_whatever_the_callers_environment(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caller: dict[str, str]
) -> None:
    for name, value in caller.items():
        monkeypatch.setenv(name, value)
    command = 'test "$MINE" = "a b" && hostname && {done}'
    finish(chain_of(run_dir, {"import": command}, env_vars={"MINE": "a b"}))


def test_rank_gets_the_cpus_that_its_stage_asks_for(run_dir: Path) -> None:
    """Test a site that binds CPUs, with an srun that does not inherit the CPU count, as in Slurm 22.05 to 24.05."""
    commands = {"import": "test $(nproc) = 2 && {done}", "data": "test $(nproc) = 1 && {done}"}
    like_them = {"setup_lines": "unset SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK", "srun_args": ["--cpu-bind=cores"]}
    finish(chain_of(run_dir, commands, cpus_per_task=2, stages={"data": {"cpus_per_task": 1}}, **like_them))


def test_jobs_start_from_within_an_allocation(run_dir: Path) -> None:
    """Run `sbatch` inside `salloc --mem-per-cpu`, through the rendered script."""
    chain = chain_of(run_dir, {"import": "{done}"})
    rendered = run_dir / "rendered"
    (job,) = chain.jobs
    chain.cluster.write(job, rendered)
    (rendered / "submit.sh").write_text(chain.cluster.render_chain(chain.jobs)["submit.sh"])
    inside = ["salloc", "--mem-per-cpu=100", "--ntasks=1", "bash", str(rendered / "submit.sh")]
    subprocess.run(inside, check=True, capture_output=True)
    wait_until(chain.done, said=lambda: str([path.read_text() for path in job.folder.glob("*.out")]), poll_s=0.5)
