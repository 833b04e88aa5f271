"""Run a chain of jobs on a scheduler: submit unfinished jobs, watch them, and report why a job ended."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UnfinishedError, UpcycleError
from nemo_upcycle.pipeline.executors.base import Cluster, UnreachableError
from nemo_upcycle.pipeline.executors.jobs import Job, JobState, Phase
from nemo_upcycle.pipeline.executors.local import StopSignals
from nemo_upcycle.pipeline.markers import ENDED, FAILED
from nemo_upcycle.sources.checkpoints import newest_checkpoint, step_of
from nemo_upcycle.utils.files import read_json, write_json


#: File that records the last submitted jobs: the cluster, and the id of each stage's job. The file is deleted when all
#: jobs have ended well.
JOBS = "jobs.json"
#: Seconds between two looks at markers and logs, and seconds until the marker of an ended job must be visible through
#: a shared file system.
POLL_S, SETTLE_S = 3.0, 30.0
#: Logs in the message about a failed job: number of logs, lines of each log, and characters of a line.
LOGS_SHOWN, LINES_SHOWN, LINE_LENGTH = 2, 4, 300


def recorded_jobs(run_dir: Path) -> dict[str, Any] | None:
    """Read `jobs.json`: the `cluster`, and its `jobs` by stage; None if there is no such file."""
    return read_json(run_dir / JOBS) if (run_dir / JOBS).is_file() else None


def _step_kept(job: Job) -> int:
    """Return the step of a training's newest checkpoint; -1 without a checkpoint."""
    kept = newest_checkpoint(job.run_dir / job.name / "checkpoints") if job.is_training else None
    step = step_of(kept) if kept else None
    return -1 if step is None else step


class Chain:
    """The jobs of a run, already submitted or still to submit.

    Args:
        cluster: scheduler that runs the jobs.
        jobs: jobs, each after the jobs that it needs.
        is_done: function that takes a stage's name and tells whether the stage is done from its present inputs; called
            only if the stages before this stage are done.
        run_dir: the run's folder, which this machine must see as well.
    """

    def __init__(self, cluster: Cluster, jobs: Sequence[Job], is_done: Callable[[str], bool], run_dir: Path) -> None:
        self.cluster, self.jobs, self._is_done, self.run_dir = cluster, list(jobs), is_done, run_dir
        recorded, self._identity = recorded_jobs(run_dir), cluster.identity  # the cluster may not answer later
        self.ids = dict(recorded["jobs"]) if recorded and recorded["cluster"] == self._identity else {}
        self._tails: dict[Path, int] = {}
        self._steps: dict[str, int] = {}
        self._shown: dict[str, str] = {}
        self._ended_s: dict[str, float] = {}
        self._asked_s = -math.inf

    def done(self) -> set[str]:
        """Return the stages that are done and whose predecessors are done."""
        done: set[str] = set()
        names = {job.name for job in self.jobs}
        for job in self.jobs:
            if all(name in done or name not in names for name in job.after) and self._is_done(job.name):
                done.add(job.name)
        return done

    def check(self) -> None:
        """Check that the scheduler would accept the jobs that are not done."""
        done = self.done()
        self.cluster.check([job for job in self.jobs if job.name not in done])

    def alive(self) -> dict[str, str]:
        """Return the ids of this run's waiting and running jobs, by stage."""
        states = self.cluster.states(list(self.ids.values())) if self.ids else {}
        return {name: identity for name, identity in self.ids.items() if states[identity].phase is not Phase.ENDED}

    def adopt(self) -> None:
        """Take over the waiting and running jobs of an earlier start, and forget jobs that have ended."""
        self.ids = self.alive()
        for job in self.jobs:
            self._steps[job.name] = _step_kept(job)
            if job.name in self.ids:
                self._say_adopted(job, self.ids[job.name])
                paths = self.cluster.logs(job, self.ids[job.name])  # skip lines that were shown before
                self._tails.update({path: path.stat().st_size for path in paths if path.exists()})

    def _say_adopted(self, job: Job, identity: str) -> None:
        """Report that a job keeps the settings of its submission, and how to give the job other settings."""
        sys.stderr.write(f"[{job.name}] was submitted before: {identity}\n")
        kept = ((job.folder / name, text) for name, text in self.cluster.render_as(job, identity).items())
        if any(path.is_file() and path.read_text(encoding="utf-8") != text for path, text in kept):
            sys.stderr.write(
                f"[{job.name}] {identity} keeps the settings that it was submitted with. To use the present ones, stop"
                f" watching, cancel it with `{self.cluster.cancel_command(identity)}` and give the same command.\n"
            )

    def submit(self) -> list[str]:
        """Submit the jobs that are neither done nor submitted, and return their ids.

        Some schedulers cannot hold a job back until earlier jobs have succeeded. On such a scheduler, this call
        submits only jobs whose earlier stages are done.

        Raises:
            UnreachableError: the scheduler does not answer; the next call submits the remaining jobs.
            UpcycleError: the scheduler refuses a job; the jobs that this call has submitted are cancelled.
        """
        done = self.done()
        new: dict[str, str] = {}
        for job in self.jobs:
            if job.name in done or job.name in self.ids:
                continue
            missing = [
                name for name in job.after if name not in done and any(other.name == name for other in self.jobs)
            ]
            if missing and not self.cluster.holds_back:
                continue
            try:
                identity = self.cluster.submit(job, [self.ids[name] for name in missing])
            except UnreachableError:
                raise
            except UpcycleError:
                self.cluster.cancel(list(new.values()))
                self._record({name: identity for name, identity in self.ids.items() if name not in new})
                raise
            new[job.name] = identity
            self._steps[job.name] = _step_kept(job)
            self._record(self.ids | {job.name: identity})
            sys.stderr.write(f"[{job.name}] submitted: {identity}\n")
        return list(new.values())

    def _record(self, ids: dict[str, str]) -> None:
        """Record the ids of the run's jobs in this object and in the run's folder."""
        self.ids = ids
        if ids:
            write_json(self.run_dir / JOBS, {"cluster": self._identity, "jobs": ids})
        else:
            (self.run_dir / JOBS).unlink(missing_ok=True)

    def watch(self, stop: StopSignals) -> bool:
        """Submit jobs when they can start, and show their output, until all stages are done.

        Returns:
            True if all stages are done, False if a signal came first.

        Raises:
            UnfinishedError: a job ended and its stage is not done; the text gives the scheduler's reason.
        """
        while not stop.signum:
            try:
                self.submit()
            except UnreachableError as error:  # a lost connection or login must not end hours of work
                self._say_once("scheduler", f"{error} Trying again.")
            done = self.done()
            for job in self.jobs:
                if job.name in self.ids:
                    self._show_log(job)
            if len(done) == len(self.jobs):
                # If this chain has only a part of the run's stages, the jobs of the other stages stay recorded.
                self._record({name: identity for name, identity in self.alive().items() if name not in done})
                return True
            if time.monotonic() >= self._asked_s + self.cluster.poll_s:
                self._asked_s = time.monotonic()
                self._look([job for job in self.jobs if job.name not in done and job.name in self.ids])
            time.sleep(POLL_S)
        return False

    def _look(self, jobs: Sequence[Job]) -> None:
        """Ask the scheduler for the states of jobs that are not done.

        Raises:
            UnfinishedError: a job has ended, its marker has not appeared in time, and it cannot be submitted again.
        """
        states = self.cluster.states([self.ids[job.name] for job in jobs]) if jobs else {}
        for job in jobs:
            state = states[self.ids[job.name]]
            if state.phase is not Phase.ENDED:
                self._ended_s.pop(job.name, None)
                reason = f": {state.reason}" if state.reason else ""
                self._say_once(job.name, f"[{job.name}] {state.phase.value}{reason}")
                continue
            first_s = self._ended_s.setdefault(job.name, time.monotonic())
            # An abandoned or orphaned job has never started, so its marker cannot come late.
            has_settled = state.is_abandoned or state.is_orphaned or time.monotonic() - first_s >= SETTLE_S
            if has_settled and job.name not in self.done():
                del self._ended_s[job.name]
                self._submit_again(job, state)
            if not state.is_orphaned:
                break  # the later jobs ended because of this job

    def _say_once(self, topic: str, text: str) -> None:
        if self._shown.get(topic) != text:
            self._shown[topic] = text
            sys.stderr.write(f"{text}\n")

    def _submit_again(self, job: Job, state: JobState) -> None:
        """Forget a job that has to be submitted again: an orphan, or a training that made progress.

        If the scheduler holds jobs back, a training requeues itself as long as it makes progress. An orphan is a job
        that the scheduler gave up because an earlier job counts as failed, although the stage of the earlier job is
        done. For example, the earlier job ended by itself just after its time limit.

        Raises:
            UnfinishedError: the job made no progress, or is not a training.
        """
        if state.is_abandoned:
            self.cluster.cancel([self.ids[job.name]])
        if state.is_orphaned:
            self._say_once(
                job.name, f"[{job.name}] {self.ids[job.name]} was lost ({state.reason}) and is submitted again"
            )
            del self.ids[job.name]
            return
        step = _step_kept(job)
        ended = job.run_dir / job.name / ENDED
        failed = ended.is_file() and ended.read_text(encoding="utf-8").strip() == FAILED
        if self.cluster.holds_back or failed or step <= self._steps.get(job.name, -1):
            raise UnfinishedError(self._failed(job, state))
        sys.stderr.write(
            f"[{job.name}] stopped{f': {state.reason}' if state.reason else ''}; resumes after step {step}\n"
        )
        del self.ids[job.name]

    def _failed(self, job: Job, state: JobState) -> str:
        why = f" ({state.reason})" if state.reason else ""
        others = [f"{name} ({identity})" for name, identity in self.alive().items() if name != job.name]
        waiting = f" Still in the queue: {', '.join(others)}." if others else ""
        how = "cannot start" if state.is_abandoned else "ended"
        last = "".join(f"\n  {path.name}: {line}" for path, line in self._last_lines(job))
        return (
            f"Stage '{job.name}' did not finish: job {self.ids[job.name]} {how}{why} and left no marker in "
            f"{self.run_dir / job.name}. Logs: {job.folder}.{waiting} Run the same command again to resume."
            f"{last and f' The last lines of its logs:{last}'}"
        )

    def _last_lines(self, job: Job) -> Iterator[tuple[Path, str]]:
        """Yield the last lines of the logs that a job wrote most recently."""
        logs = [path for path in self.cluster.logs(job, self.ids[job.name]) if path.is_file()]
        for path in sorted(logs, key=lambda path: path.stat().st_mtime)[-LOGS_SHOWN:]:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 4096))
                lines = file.read().decode(errors="replace").splitlines()
            written = [line.strip()[:LINE_LENGTH] for line in lines if line.strip()]
            yield from ((path, line) for line in written[-LINES_SHOWN:])

    def _show_log(self, job: Job) -> None:
        """Print the new output of a job."""
        for path in self.cluster.logs(job, self.ids[job.name]):
            try:
                with path.open("rb") as file:
                    file.seek(self._tails.get(path, 0))
                    new = file.read()
            except OSError:
                continue
            whole = new[: new.rfind(b"\n") + 1]
            self._tails[path] = self._tails.get(path, 0) + len(whole)
            sys.stderr.write(whole.decode(errors="replace"))
