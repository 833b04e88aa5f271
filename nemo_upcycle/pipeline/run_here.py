"""Run stages on this machine, several at once if none needs another."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import StageStopped, UnfinishedError, UpcycleError
from nemo_upcycle.pipeline.executors import local, performance
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.live import LiveStages, has_live_lines
from nemo_upcycle.pipeline.order import before, finished, unfinished
from nemo_upcycle.pipeline.plan import Stage, WorkPlan
from nemo_upcycle.pipeline.runner import DONE_BEFORE
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.utils.command_line import CommandLine
from nemo_upcycle.utils.console import end_soon
from nemo_upcycle.utils.progress import duration
from nemo_upcycle.utils.starting import away_from_here
from nemo_upcycle.utils.validation import check_whole


_AGAIN = "Run the same command again to resume. Folder:"
_POLL_S = 0.2


def check_at_once(at_once: int, *, is_here: bool) -> None:
    """Check how many stages may run at once.

    Raises:
        UpcycleError: several stages cannot run at once here.
    """
    check_whole("at_once", at_once, 1)
    if at_once > 1 and not is_here:
        fix = "omit at_once: a scheduler starts as many trainings as fit"
        raise UpcycleError("at_once", kind="refused", got=f"{at_once} cannot be combined with an executor", fix=fix)
    if at_once > 1 and torch.cuda.is_available():
        fix = "omit at_once, or use an executor"
        raise UpcycleError(
            "at_once",
            kind="refused",
            got=f"{at_once} is not possible on GPUs, which the trainings would share",
            fix=fix,
        )


def run_stages(jobs: Sequence[Job], run_dir: Path, plan: WorkPlan, executor: Any = None, at_once: int = 1) -> None:
    """Run each stage as soon as the stages that it needs are done. If a stage does not finish, start no more.

    On a terminal, or if several stages run at once, the output of a stage goes to `logs/STAGE-rank0.log`. A terminal
    shows one line per running stage. If several stages run at once, the console shows which stages have started, and
    how many trainings are left.

    Args:
        jobs: jobs of the stages, each after the jobs that it needs.
        run_dir: the run's folder.
        plan: plan of the run.
        executor: NeMo-Run's local executor, whose variables the stages get; None if the stages get no variables.
        at_once: number of stages that may run at the same time.

    Raises:
        SystemExit: with 2 after a user's mistake, 75 if a stage stopped and can resume, 1 after another failure, 130
            or 143 after a signal. The last message is the stage's own.
        UnfinishedError: a stage ended with status 0 but wrote no marker.
    """
    end_soon()  # exit fast, however the run ends; nothing is imported after this
    waiting, running = list(jobs), dict[Future[int], Job]()
    began_s, took_s = dict[str, float](), list[float]()
    stopped_stages: list[Stage] = []
    failed: tuple[Stage, int] | None = None
    live = LiveStages(run_dir, echoes=at_once == 1) if has_live_lines() else None
    is_quiet = at_once > 1 or live is not None
    with (
        live or nullcontext(),
        local.StopSignals() as stop,
        ThreadPoolExecutor(at_once) as pool,
        _ended_by_error(stop),
    ):
        while running or (waiting and failed is None and not stop.signum):
            while failed is None and not stop.signum and len(running) < at_once:
                ready = (job for job in waiting if unfinished(before(plan, job.name), run_dir, plan) is None)
                if (job := next(ready, None)) is None:
                    break
                waiting.remove(job)
                if plan.stage(job.name).is_done(run_dir, plan):
                    _say(f"[{job.name}] {DONE_BEFORE}")
                    continue
                began_s[job.name] = time.monotonic()
                if live:
                    live.began(job.name, local.log_of(_logs_of(job), 0))
                if at_once > 1:
                    _say(f"[{job.name}] started: {local.log_of(_logs_of(job), 0)}")
                running[pool.submit(_run, job, executor, stop, at_once, is_quiet)] = job
            for future in wait(running, _POLL_S, FIRST_COMPLETED).done:
                job = running.pop(future)
                stage, took = plan.stage(job.name), time.monotonic() - began_s[job.name]
                is_done = not future.result() and stage.is_done(run_dir, plan)
                if live:
                    live.ended(job.name, is_done=is_done)
                if is_done:
                    took_s += [took] if job.is_training else []
                    left = sum(one.is_training for one in (*waiting, *running.values()))
                    eta = f", ETA {duration(statistics.fmean(took_s) * left / at_once)}" if took_s and left else ""
                    if at_once > 1:
                        _say(f"[{job.name}] done; {left} trainings left{eta}")
                elif stop.signum:
                    stopped_stages.append(stage)
                else:
                    failed = failed or (stage, future.result())
                    if at_once > 1:
                        _say(f"[{job.name}] did not finish. Run the same command again to resume in {run_dir}")
    if stop.signum:
        sys.stderr.write(stopped(stop.signum, stopped_stages, run_dir, plan))
        raise SystemExit(128 + stop.signum)
    if failed and failed[1]:
        raise SystemExit(_exit_status(failed[0].name, failed[1], run_dir))
    if failed:
        raise UnfinishedError(
            f"Stage '{failed[0].name}' did not finish; see its error message above. {_AGAIN} {run_dir}"
        )


@contextmanager
def _ended_by_error(stop: local.StopSignals) -> Iterator[None]:
    """End the running stages if the block raises, because the pool would wait for them."""
    try:
        yield
    except Exception:
        stop.signum = signal.SIGTERM
        raise


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _exit_status(name: str, status: int, run_dir: Path) -> int:
    """Return the launcher's exit status for a failed stage. If the stage was killed, report this."""
    if status < 0:
        signal_name = signal.Signals(-status).name
        hint = " (out of memory?)" if signal_name == "SIGKILL" else ""
        _say(f"Error: stage '{name}' was ended by {signal_name}{hint}. {_AGAIN} {run_dir}")
    return status if status in (local.USERS_MISTAKE, StageStopped.exit_status) else 1


def _run(job: Job, executor: Any, stop: local.StopSignals, at_once: int, is_quiet: bool) -> int:
    """Run a stage, and return its exit status as `run_ranks` does."""
    ranks = job.ranks_per_node if job.is_training else None
    variables = performance.variables(performance.performance_settings_here(job))
    variables |= variables_for(at_once * (ranks or 1), executor)
    return local.run_ranks(away_from_here(job.command), ranks, variables, _logs_of(job), stop, is_quiet=is_quiet)


def _logs_of(job: Job) -> Path:
    """Return the prefix of a stage's log files."""
    return job.run_dir / "logs" / job.name


def variables_for(ranks: int, executor: Any) -> dict[str, str]:
    """Return the variables of ranks on this machine: the user's variables, and the threads per rank."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // ranks))
    return {"OMP_NUM_THREADS": threads, **(executor.env_vars if executor else {})}


def stopped(signum: int, stages: Sequence[Stage], run_dir: Path, plan: WorkPlan) -> str:
    """Write the last message of a stopped run: what was kept, and how to resume."""
    kept = f"finished stages: {', '.join(finished(run_dir, plan)) or 'none'}"
    for stage in (stage for stage in stages if stage.resumable):
        last = newest_checkpoint(run_dir / stage.name / "checkpoints")
        kept += f"; last checkpoint of {stage.name}: {last}" if last else f"; no checkpoint of {stage.name} yet"
    names = " and ".join(f"'{stage.name}'" for stage in stages)
    return (
        f"\nStopped by {signal.Signals(signum).name} in stage {names}. Kept in {run_dir}: {kept}.\n"
        f"Resume with the same command: {CommandLine.typed()}\n"
    )
