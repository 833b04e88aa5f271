"""A chain of jobs, on a scheduler that is a process of this machine for each of them."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nemo_run as run
import pytest

from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.pipeline import chain as chain_module
from nemo_upcycle.pipeline.chain import Chain
from nemo_upcycle.pipeline.executors.base import Cluster, Job, JobState, Phase
from nemo_upcycle.pipeline.executors.local import StopSignals


class Processes(Cluster):
    """Starts a process a job, and like Kubernetes holds none back."""

    label = "processes"
    poll_s = 0.0

    def __init__(self) -> None:
        super().__init__(run.LocalExecutor())
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def check_settings(self, jobs: Sequence[Job]) -> None: ...

    def check(self, jobs: Sequence[Job]) -> None: ...

    def render(self, job: Job) -> dict[str, str]:
        return {f"{job.name}.txt": " ".join(job.command)}

    def submit(self, job: Job, after: Sequence[str]) -> str:
        if job.command[-1] == "refused":
            raise UpcycleError("refused")
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(job.command, stdout=log, stderr=log, cwd=job.run_dir)
        self.processes[str(process.pid)] = process
        return str(process.pid)

    def states(self, ids: Sequence[str]) -> Mapping[str, JobState]:
        return {identity: self._state(identity) for identity in ids}

    def _state(self, identity: str) -> JobState:
        status = self.processes[identity].poll()
        return JobState(Phase.RUNNING) if status is None else JobState(Phase.ENDED, f"exit status {status}")

    def cancel(self, ids: Sequence[str]) -> None:
        for identity in ids:
            self.processes[identity].kill()

    def logs(self, job: Job, identity: str) -> Sequence[Path]:
        return [job.folder / "log.txt"]

    def resources(self, job: Job) -> dict[str, str]:
        return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "POLL_S", 0.05)
    monkeypatch.setattr(chain_module, "SETTLE_S", 0.2)


def chain_of(run_dir: Path, commands: Mapping[str, str], after: Mapping[str, tuple[str, ...]] | None = None) -> Chain:
    """Return a chain of shell commands; a stage is done when its file is there."""
    needed = after or {}
    jobs = [Job(name, run_dir, ("bash", "-c", text), needed.get(name, ())) for name, text in commands.items()]
    return Chain(Processes(), jobs, lambda name: (run_dir / name).is_file(), run_dir)


def test_a_stage_starts_when_those_that_it_needs_are_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chain = chain_of(
        tmp_path,
        {
            "a": "echo hello; touch a",
            "b": "sleep 0.3; touch b",
            "c": "test -e b || touch c",
            "d": "test -e b && touch d",
        },
        {"c": ("a",), "d": ("b", "c")},
    )
    chain.submit()
    assert set(chain.ids) == {"a", "b"}
    with StopSignals() as stop:
        assert chain.watch(stop)
    assert chain.done() == {"a", "b", "c", "d"}  # c ran beside b
    assert "hello\n" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["exit 3", "true"])
def test_a_job_that_leaves_no_marker_ends_the_chain(tmp_path: Path, text: str) -> None:
    chain = chain_of(tmp_path, {"a": text, "b": "touch b"}, {"b": ("a",)})
    with StopSignals() as stop, pytest.raises(StageError, match=r"Stage 'a' did not finish: job \d+ ended \(exit"):
        chain.watch(stop)
    assert not (tmp_path / "b").exists()


def test_a_signal_stops_the_watching_and_a_new_start_finds_the_job(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, {"a": "sleep 1; touch a"})
    with StopSignals() as stop:
        threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
        assert not chain.watch(stop)
    assert set(chain.alive()) == {"a"}
    again = Chain(chain.cluster, chain.jobs, lambda name: (tmp_path / name).is_file(), tmp_path)
    again.adopt()
    assert again.submit() == []
    with StopSignals() as stop:
        assert again.watch(stop)


def test_a_refused_job_takes_back_those_before_it(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, {"a": "sleep 60", "b": "refused"})
    chain.jobs[1] = Job("b", tmp_path, ("refused",))
    with pytest.raises(UpcycleError, match="refused"):
        chain.submit()
    time.sleep(0.1)
    assert chain.alive() == {}
