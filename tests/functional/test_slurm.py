"""The chain as jobs of a real Slurm with two nodes: a scheduler stops the jobs in every way, and they resume.

`make test-in ENV=slurm` runs both of these commands:

    scripts/slurm_cluster.sh start
    python -m pytest tests/functional/test_slurm.py
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from nemo_upcycle.utils.files import MARKER, read_json
from tests.functional.soak import training_result
from tests.functional.stages import STAGES
from tests.functional.started import CHAIN, ROOT, Command
from tests.functional.tiny import write_inputs
from tests.waiting import wait_until


def _answer(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout


@cache
def has_test_cluster() -> bool:
    """Return whether the Slurm of scripts/slurm_cluster.sh answers here; if it is stopped, do not wait for it."""
    if _answer("pgrep", "-x", "slurmctld") is None:
        return False
    return {"batch", "low"} <= {*(_answer("sinfo", "--noheader", "--format=%R") or "").split()}


pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(not has_test_cluster(), reason="no Slurm: scripts/slurm_cluster.sh start"),
]

EXECUTOR = """
executor: slurm
account: root
partition: {partition}
container_image: null
time: "00:20:00"
mem: "0"
env_vars: {{OMP_NUM_THREADS: "1", PYTHONPATH: "{root}"}}
stages:
  pretrain: {{time: "{time}", signal: "TERM@{signal_s}", hang_detection: {ft}, silence_s: 40}}
"""


class Run:
    """The pipeline command in a run's folder."""

    def __init__(self, inputs: Path, run_dir: Path) -> None:
        self.inputs, self.run_dir = inputs, run_dir
        self.command: Command

    def start(
        self,
        *words: str,
        slow: float = 0.0,
        hang_detection: bool = False,
        hang: bool = False,
        partition: str = "batch",
        time_limit: str = "00:20:00",
        signal_s: int = 60,
    ) -> Run:
        """Start the command."""
        executor = self.run_dir.with_name(f"{self.run_dir.name}.yaml")
        values = {"partition": partition, "time": time_limit, "signal_s": signal_s, "ft": str(hang_detection).lower()}
        executor.write_text(EXECUTOR.format(root=ROOT, **values))
        factory = f"tiny(inputs='{self.inputs}', dir='{self.run_dir}', nodes=2)"
        chain = [CHAIN, "--factory", factory, f"run.executor={executor}", *words, "--yes"]
        disturb = {"SLOW_S": str(slow), "HUNG": str(self.run_dir / "hung") if hang else ""}
        log = self.run_dir.with_name(f"{self.run_dir.name}.txt")
        self.command = Command(log, *chain, NEMORUN_HOME=str(self.inputs / "home"), **disturb)
        return self

    def wait_for_step(self, step: int) -> None:
        """Wait until the upcycled model's training has finished a step."""
        self.command.wait_for_lines(self.run_dir / "pretrain/metrics.jsonl", step)

    def job(self, stage: str = "pretrain") -> str:
        """Return the id of a stage's job."""
        return str(read_json(self.run_dir / "jobs.json")["jobs"][stage])

    def starts(self) -> int:
        """Return how many times the training was started."""
        return len(list((self.run_dir / "jobs/pretrain").glob("log-*")))


def start_at_once(job: str) -> None:
    """Make a requeued job start soon, not after two minutes. Slurm refuses this change while nodes clean up."""
    asked = ("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    wait_until(lambda: (_answer(*asked) or "").strip() == "PENDING", poll_s=0.2)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+10"], check=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def undisturbed(inputs: Path) -> Run:
    """The whole chain, undisturbed."""
    run = Run(inputs, inputs / "undisturbed").start(slow=0.5)
    assert run.command.wait() == 0, run.command.text()
    return run


@pytest.fixture
def prepared(undisturbed: Run, inputs: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    """A run whose next stage is the training."""
    run_dir = inputs / request.node.name.translate({ord("["): "-", ord("]"): None})
    shutil.copytree(undisturbed.run_dir, run_dir, symlinks=True)
    for name in ("pretrain", "dense_ct", "jobs"):
        shutil.rmtree(run_dir / name)
    run = Run(inputs, run_dir)
    yield run
    run.command.process.kill()
    if (run_dir / "jobs.json").is_file():
        subprocess.run(["scancel", *read_json(run_dir / "jobs.json")["jobs"].values()], check=True)


def test_every_stage_is_a_job(undisturbed: Run) -> None:
    assert all((undisturbed.run_dir / name / MARKER).is_file() for name in STAGES)
    submitted = [line for line in undisturbed.command.text().splitlines() if "submitted: " in line]
    assert [line.partition("]")[0].strip("[") for line in submitted] == list(STAGES)
    assert "Report: " in undisturbed.command.text()
    again = Run(undisturbed.inputs, undisturbed.run_dir).start(slow=0.5)
    assert again.command.wait() == 0
    assert again.command.text().count("submitted: ") == len(STAGES)  # all from the first start


PART = ("--from", "pretrain", "--until", "pretrain")


def _requeue(run: Run) -> None:
    run.wait_for_step(3)
    subprocess.run(["scontrol", "requeue", run.job()], check=True)


def _preempt(run: Run) -> None:
    run.wait_for_step(3)
    subprocess.run(["srun", "--partition=batch", "--nodes=2", "--exclusive", "sleep", "2"], check=True)


def _lose_a_node(run: Run) -> None:
    run.wait_for_step(3)
    with _daemon_of_n2_killed():
        start_at_once(run.job())
        time.sleep(1)


@contextmanager
def _daemon_of_n2_killed() -> Iterator[None]:
    """Take node n2 away: kill its daemon and its processes, and tell the controller."""
    victims = (_answer("pgrep", "-f", "slurmd -N n2") or "").split()
    stepd = (_answer("pgrep", "-f", r"slurmstepd: \[.*\.0\]") or "").split()
    for pid in [*victims, *stepd[-1:]]:
        os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost"], check=True)
    try:
        yield
    finally:
        subprocess.run(["slurmd", "-N", "n2"], check=True)
        subprocess.run(["scontrol", "update", "NodeName=n2", "State=RESUME"], check=False)  # n2 may be back already


@pytest.mark.parametrize(
    ("disturb", "partition"),
    [(_requeue, "batch"), (_preempt, "low"), (_lose_a_node, "batch")],
    ids=["requeue", "preempt", "node-lost"],
)
def test_a_training_goes_on_with_the_same_bits(
    prepared: Run, undisturbed: Run, disturb: Callable[[Run], None], partition: str
) -> None:
    prepared.start(*PART, slow=3.0, partition=partition)
    disturb(prepared)
    start_at_once(prepared.job())
    assert prepared.command.wait() == 0, prepared.command.text()
    assert prepared.starts() >= 2  # 3 if the ranks fail before Slurm notices the missing node
    assert training_result(prepared.run_dir / "pretrain") == training_result(undisturbed.run_dir / "pretrain")


@pytest.mark.parametrize(
    ("hang_detection", "slow", "time_limit", "signal_s", "times"),
    [(False, 50.0, "00:03:00", 75, 2), (True, 20.0, "00:02:00", 30, 1)],
    ids=["srun", "ft_launcher"],
)
def test_a_time_limit_loses_nothing(
    prepared: Run, undisturbed: Run, hang_detection: bool, slow: float, time_limit: str, signal_s: int, times: int
) -> None:
    prepared.start(*PART, slow=slow, hang_detection=hang_detection, time_limit=time_limit, signal_s=signal_s)
    seen = 0
    while prepared.command.process.poll() is None:
        if requeues(prepared) > seen:
            seen += 1
            start_at_once(prepared.job())
        time.sleep(0.2)
    assert prepared.command.wait() == 0, prepared.command.text()
    assert seen >= times
    assert training_result(prepared.run_dir / "pretrain") == training_result(undisturbed.run_dir / "pretrain")


def requeues(run: Run) -> int:
    """Return how many times the batch script has asked for another start."""
    logs = (run.run_dir / "jobs/pretrain").glob("sbatch_*")
    return sum(path.read_text().count("to be requeued") for path in logs)


def test_a_hung_rank_is_restarted_within_the_job(prepared: Run, undisturbed: Run) -> None:
    prepared.start(*PART, slow=0.5, hang_detection=True, hang=True)
    assert prepared.command.wait() == 0, prepared.command.text()
    assert (prepared.run_dir / "hung").exists()
    assert prepared.starts() == 1
    assert training_result(prepared.run_dir / "pretrain") == training_result(undisturbed.run_dir / "pretrain")


def test_scancel_ends_the_chain_and_requeues_nothing(prepared: Run) -> None:
    prepared.start("--from", "pretrain", slow=3.0)
    prepared.wait_for_step(3)
    others = read_json(prepared.run_dir / "jobs.json")["jobs"]
    subprocess.run(["scancel", prepared.job()], check=True)
    assert prepared.command.wait() == 1
    assert "Stage 'pretrain' did not finish: job" in prepared.command.text()
    assert "CANCELLED" in prepared.command.text()
    assert prepared.starts() == 1
    subprocess.run(["scancel", *others.values()], check=True)


def test_a_failed_stage_takes_the_rest_out_of_the_queue(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("the state of our union")
    (tmp_path / "other.txt").write_text("the state of our union")  # held out, so nothing is left to train on
    (tmp_path / "same.yaml").write_text("sources: {mine: {train: [same.txt], heldout: [other.txt]}}\n")
    run = Run(inputs, inputs / "failed").start(f"data={tmp_path}/same.yaml")
    assert run.command.wait() == 1
    assert "Stage 'data' did not finish: job" in run.command.text()
    queue = _answer("squeue", "--noheader", "--format=%i") or ""
    assert not set(queue.split()) & set(read_json(run.run_dir / "jobs.json")["jobs"].values())
