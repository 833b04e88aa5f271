"""A chain of jobs on a scheduler that runs each job as a local process."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import nemo_run as run
import pytest

from nemo_upcycle.errors import UnfinishedError, UpcycleError
from nemo_upcycle.pipeline import chain as chain_module
from nemo_upcycle.pipeline.chain import Chain, recorded_jobs
from nemo_upcycle.pipeline.executors.base import Cluster, UnreachableError
from nemo_upcycle.pipeline.executors.jobs import Job, JobState, Phase
from nemo_upcycle.pipeline.executors.kubernetes import KubernetesScheduler
from nemo_upcycle.pipeline.executors.kubernetes_settings import KubernetesExecutor
from nemo_upcycle.pipeline.executors.local import StopSignals
from tests.unit.pipeline.test_kubernetes import FakeApi


class Processes(Cluster):
    """Starts a process per job and, like Kubernetes, cannot make a job wait for another job."""

    label = "processes"
    poll_s = 0.0

    def __init__(self) -> None:
        super().__init__(run.LocalExecutor())
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.answers: dict[str, UpcycleError] = {}

    def wrong_for_all(self) -> list[UpcycleError]:
        return []

    def wrong_for(self, job: Job) -> list[UpcycleError]:
        return []

    def check(self, jobs: Sequence[Job]) -> None: ...

    def render(self, job: Job) -> dict[str, str]:
        return {f"{job.name}.sh": " ".join(job.command)}

    def submit(self, job: Job, after: Sequence[str]) -> str:
        assert len(self.processes) < 20, "a job is submitted again and again"
        if job.name in self.answers:
            raise self.answers.pop(job.name)
        job.folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.render(job).items():
            (job.folder / name).write_text(text)
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
            self.processes[identity].wait()

    def cancel_command(self, identity: str) -> str:
        return f"kill {identity}"

    def logs(self, job: Job, identity: str) -> Sequence[Path]:
        return [job.folder / "log.txt", job.folder / "sbatch.txt"]

    def resources(self, job: Job) -> dict[str, str]:
        return {}


#: Shell command of a job that must not end before the test allows it.
_UNTIL_GO = "until test -e go; do sleep 0.05; done"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "POLL_S", 0.05)
    monkeypatch.setattr(chain_module, "SETTLE_S", 0.2)


def chain_of(
    run_dir: Path,
    commands: Mapping[str, str],
    after: Mapping[str, tuple[str, ...]] | None = None,
    cluster: Cluster | None = None,
) -> Chain:
    """Return a chain of shell commands; a stage is done when a file with the stage's name exists."""
    needed = after or {}
    jobs = [Job(name, run_dir, ("bash", "-c", text), needed.get(name, ())) for name, text in commands.items()]
    return Chain(cluster or Processes(), jobs, lambda name: (run_dir / name).is_file(), run_dir)


def watch(chain: Chain) -> bool:
    """Watch a chain until it is done or a signal comes."""
    with StopSignals() as stop:
        return chain.watch(stop)


def restarted(chain: Chain, commands: Mapping[str, str]) -> Chain:
    """Start the same run again, and let it find the jobs of the earlier start."""
    found = chain_of(chain.run_dir, commands, cluster=chain.cluster)
    found.adopt()
    return found


def test_a_stage_starts_when_those_that_it_needs_are_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = {"a": "echo hello; touch a", "b": "until test -e c; do sleep 0.05; done; touch b"}
    commands |= {"c": "test -e b || touch c", "d": "test -e b && touch d"}
    chain = chain_of(tmp_path, commands, {"c": ("a",), "d": ("b", "c")})
    chain.submit()
    assert set(chain.ids) == {"a", "b"}
    assert watch(chain)
    assert chain.done() == {"a", "b", "c", "d"}  # b and c ran at the same time
    assert "hello\n" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["exit 3", "true"])
def test_a_job_that_leaves_no_marker_ends_the_chain(tmp_path: Path, text: str) -> None:
    chain = chain_of(tmp_path, {"a": text, "b": "touch b"}, {"b": ("a",)})
    with pytest.raises(UnfinishedError, match=r"Stage 'a' did not finish: job \d+ ended \(exit"):
        watch(chain)
    assert not (tmp_path / "b").exists()


def test_a_new_start_finds_the_job_after_a_signal(tmp_path: Path) -> None:
    text = f"{_UNTIL_GO}; touch a"
    chain = chain_of(tmp_path, {"a": text})
    with StopSignals() as stop:
        threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
        assert not chain.watch(stop)
    assert set(chain.alive()) == {"a"}
    again = restarted(chain, {"a": text})
    assert again.submit() == []
    (tmp_path / "go").touch()
    assert watch(again)
    assert recorded_jobs(tmp_path) is None


def test_refused_job_takes_back_those_of_the_same_call(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, {"first": "sleep 600"})
    chain.submit()
    more = restarted(chain, {"first": "sleep 600", "a": "sleep 600", "b": "true"})
    more.cluster.answers["b"] = UpcycleError("refused")  # type: ignore[attr-defined]
    with pytest.raises(UpcycleError, match="refused"):
        more.submit()
    assert (recorded_jobs(tmp_path) or {})["jobs"] == more.ids == more.alive() == chain.ids
    chain.cluster.cancel(list(chain.ids.values()))


def test_unanswered_submission_ends_nothing_and_is_tried_again(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, {"a": "sleep 0.3; touch a", "b": "touch b"})
    chain.cluster.answers["b"] = UnreachableError("no answer")  # type: ignore[attr-defined]
    assert watch(chain)
    assert len(chain.cluster.processes) == 2  # type: ignore[attr-defined]


def test_finished_part_leaves_the_jobs_of_the_others(tmp_path: Path) -> None:
    commands = {"a": "touch a", "b": f"{_UNTIL_GO}; touch b"}
    whole = chain_of(tmp_path, commands)
    whole.submit()
    assert watch(restarted(whole, {"a": commands["a"]}))
    again = restarted(whole, commands)
    assert again.submit() == []
    assert again.ids == {"b": whole.ids["b"]}
    (tmp_path / "go").touch()
    assert watch(again)


def test_job_of_other_settings_is_watched_with_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chain = chain_of(tmp_path, {"a": "sleep 600", "b": "sleep 600"})
    chain.submit()
    capfd.readouterr()
    restarted(chain, {"a": "sleep 601", "b": "sleep 600"})
    a, b = chain.ids.values()
    said = capfd.readouterr().err
    assert f"[a] {a} keeps the settings that it was submitted with." in said
    assert f"`kill {a}`" in said
    assert [line for line in said.splitlines() if line.startswith("[b]")] == [f"[b] was submitted before: {b}"]
    chain.cluster.cancel([a, b])


def test_a_stage_is_not_done_before_its_inputs(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    chain = chain_of(tmp_path, {"a": "true", "b": "true"}, {"b": ("a",)})
    assert chain.done() == set()
    (tmp_path / "a").touch()
    assert chain.done() == {"a", "b"}


@pytest.mark.parametrize("kept", [[-1, -1], [3, 3], [-1, 3, 3, 6, 6, 6]], ids=str)
def test_training_goes_on_as_it_gets_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[int]) -> None:
    """`kept` lists the step of the newest checkpoint at each start and each end."""
    cluster, found = Processes(), iter(kept)
    monkeypatch.setattr(chain_module, "_step_kept", lambda job: next(found))
    jobs = [Job("pretrain", tmp_path, ("false",), is_training=True)]
    chain = Chain(cluster, jobs, lambda name: False, tmp_path)
    with pytest.raises(UnfinishedError, match="Stage 'pretrain' did not finish"):
        watch(chain)
    assert len(cluster.processes) == len(kept) / 2


class HoldsBack(Processes):
    """Accepts all jobs at once, as Slurm does, and cancels jobs that wait for a failed job."""

    holds_back = True

    def __init__(self, given_up: Phase) -> None:
        super().__init__()
        self.waits: dict[str, tuple[Job, Sequence[str]]] = {}
        self.given_up = given_up

    def submit(self, job: Job, after: Sequence[str]) -> str:
        if not after:
            return super().submit(job, after)
        self.waits[f"{job.name}-{len(self.waits)}"] = job, after
        return list(self.waits)[-1]

    def _state(self, identity: str) -> JobState:
        if identity in self.processes:
            return super()._state(identity)
        statuses = [self.processes[name].poll() if name in self.processes else 1 for name in self.waits[identity][1]]
        if None in statuses:
            return JobState(Phase.WAITING, "Dependency")
        assert any(statuses), "another fake is needed where jobs end with status 0"
        return JobState(Phase.ENDED, "given up", is_orphaned=True, is_abandoned=self.given_up is Phase.WAITING)

    def cancel(self, ids: Sequence[str]) -> None:
        super().cancel([name for name in ids if name in self.processes])


@pytest.mark.parametrize("given_up", [Phase.WAITING, Phase.ENDED])
def test_a_lost_job_of_a_done_stage_is_submitted_again(tmp_path: Path, given_up: Phase) -> None:
    commands = {"a": "touch a; exit 1", "b": "touch b; exit 139", "c": "touch c"}
    chain = chain_of(tmp_path, commands, {"b": ("a",), "c": ("a", "b")}, HoldsBack(given_up))
    chain.submit()
    assert watch(chain)


@pytest.mark.parametrize("given_up", [Phase.WAITING, Phase.ENDED])
def test_the_message_has_the_failed_stages_last_lines(tmp_path: Path, given_up: Phase) -> None:
    said = "for n in $(seq 50); do echo line $n; done; echo out of memory >&2"
    commands = {"a": f"{said}; echo slurmstepd: killed > jobs/a/sbatch.txt; exit 1", "b": "touch b", "c": "touch c"}
    chain = chain_of(tmp_path, commands, {"b": ("a",), "c": ("b",)}, HoldsBack(given_up))
    chain.submit()
    with pytest.raises(UnfinishedError, match="Stage 'a'") as caught:
        watch(chain)
    text = str(caught.value)
    said = ("log.txt: out of memory", "sbatch.txt: slurmstepd: killed", "line 1\n")
    assert [words in text for words in said] == [True, True, False]


def test_an_ignored_job_ends_the_chain(tmp_path: Path) -> None:
    api = FakeApi()
    settings = KubernetesExecutor(image="i", claim="c", mount_path="/", report_within_s=0)
    cluster = KubernetesScheduler(settings, api)  # type: ignore[arg-type]
    cluster.poll_s = 0.0
    with pytest.raises(UnfinishedError, match=r"cannot start \(no controller has reported"):
        watch(chain_of(tmp_path, {"a": "true"}, cluster=cluster))
    assert api.jobs == {}
