"""Run stages on this machine, several at once where none needs another: small trainings on one core each."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.console import end_soon
from nemo_upcycle.pipeline.executors import local
from nemo_upcycle.pipeline.executors.base import Job
from nemo_upcycle.pipeline.in_turn import exit_status, logs_of, run_here, stopped
from nemo_upcycle.pipeline.order import before, unfinished
from nemo_upcycle.pipeline.plan import Plan, Stage
from nemo_upcycle.pipeline.runner import DONE_BEFORE
from nemo_upcycle.utils.progress import duration


_POLL_S = 0.2


def check_at_once(at_once: int, *, is_here: bool) -> None:
    """Check how many stages shall run at once.

    Raises:
        UpcycleError: more than one where they cannot.
    """
    if at_once < 1:
        raise UpcycleError("at_once", got=at_once, expected="a whole number from 1 on", fix="write 1")
    if at_once == 1:
        return
    where = {"with an executor": not is_here, "on GPUs": torch.cuda.is_available()}
    for place, holds in where.items():
        if holds:
            raise UpcycleError(
                "at_once",
                got=f"{at_once} {place}",
                expected="1",
                fix="omit it: a scheduler starts what there is room for"
                if not is_here
                else "omit it, or use an executor: trainings would share the GPUs",
            )


def run_side_by_side(jobs: Sequence[Job], run_dir: Path, plan: Plan, at_once: int) -> None:
    """Run stages as soon as those that they need are done; start nothing else after one that did not finish.

    What a stage prints goes to `logs/STAGE-rank0.log`; the console says which started, and how many are left.

    Args:
        jobs: of the stages, each after those that it needs.
        run_dir: the run's folder.
        plan: of the run.
        at_once: how many may run.

    Raises:
        SystemExit: as `run_in_turn`.
    """
    end_soon()
    waiting = list(jobs)
    running: dict[Future[int], Job] = {}
    took_s: list[float] = []
    ended_early: list[Stage] = []
    status, began_s = 0, dict[str, float]()
    with local.StopSignals() as stop, ThreadPoolExecutor(at_once) as pool, _ended_by_error(stop):
        while running or (waiting and not status and not stop.signum):
            while not status and not stop.signum and len(running) < at_once:
                job = _next(waiting, run_dir, plan)
                if job is None:
                    break
                waiting.remove(job)
                if plan.stage(job.name).is_done(run_dir, plan):
                    _say(f"[{job.name}] {DONE_BEFORE}")
                    continue
                _say(f"[{job.name}] started: {logs_of(run_dir, job)}-rank0.log")
                began_s[job.name] = time.monotonic()
                running[pool.submit(run_here, job, run_dir, None, stop, at_once)] = job
            done, _ = wait(running, _POLL_S, FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                if future.result() or not plan.stage(job.name).is_done(run_dir, plan):
                    ended_early.append(plan.stage(job.name))
                    if not stop.signum:
                        status = status or exit_status(job.name, future.result(), run_dir)
                        _say(f"[{job.name}] did not finish. Run the same command again: it goes on from {run_dir}")
                    continue
                took_s += [time.monotonic() - began_s[job.name]] if job.is_training else []
                left = sum(one.is_training for one in (*waiting, *running.values()))
                eta = f", ETA {duration(statistics.fmean(took_s) * left / at_once)}" if took_s and left else ""
                _say(f"[{job.name}] done; {left} trainings left{eta}")
        if stop.signum:
            sys.stderr.write(stopped(stop.signum, ended_early, run_dir, plan))
            raise SystemExit(128 + stop.signum)
    if status:
        raise SystemExit(status)


@contextmanager
def _ended_by_error(stop: local.StopSignals) -> Iterator[None]:
    """End what runs when the block raises: the pool would wait for it."""
    try:
        yield
    except Exception:
        stop.signum = signal.SIGTERM
        raise


def _next(waiting: Sequence[Job], run_dir: Path, plan: Plan) -> Job | None:
    """Return the first stage that needs nothing more."""
    return next((job for job in waiting if unfinished(before(plan, job.name), run_dir, plan) is None), None)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
