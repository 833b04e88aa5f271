"""Run stages one after the other: on this machine, or on an executor of NeMo-Run's that has no file in executors/."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_run as run
import torch

from nemo_upcycle.errors import StageStopped, UnfinishedError
from nemo_upcycle.pipeline.console import command_line, end_soon
from nemo_upcycle.pipeline.executors import local, performance
from nemo_upcycle.pipeline.executors.base import Job, is_local
from nemo_upcycle.pipeline.order import finished
from nemo_upcycle.pipeline.plan import Plan, Stage
from nemo_upcycle.pipeline.runner import DONE_BEFORE, run_stage
from nemo_upcycle.sources.checkpoints import newest_checkpoint


_AGAIN = "Run the same command again: it goes on from there. Folder:"


def run_in_turn(jobs: Sequence[Job], run_dir: Path, plan: Plan, executor: Any) -> None:
    """Run stage by stage; start nothing else after a stage that did not finish, for whatever reason.

    Raises:
        SystemExit: with 2 after a mistake of the user's, 75 when a stage stopped and can go on, 1 after another
            failure, 130 or 143 when stopped. The last words are the stage's own.
    """
    end_soon()  # however it ends; nothing is imported after this
    with local.StopSignals() as stop:
        for job in jobs:
            stage = plan.stage(job.name)
            if stage.is_done(run_dir, plan):
                sys.stderr.write(f"[{stage.name}] {DONE_BEFORE}\n")
                continue
            status = _run_one(job, run_dir, executor, stop)
            if stop.signum:
                sys.stderr.write(stopped(stop.signum, [stage], run_dir, plan))
                raise SystemExit(128 + stop.signum)
            if status:
                raise SystemExit(exit_status(stage.name, status, run_dir))
            if not stage.is_done(run_dir, plan):
                raise UnfinishedError(
                    f"Stage '{stage.name}' did not finish; its message stands above. {_AGAIN} {run_dir}"
                )


def exit_status(name: str, status: int, run_dir: Path) -> int:
    """Return the launcher's exit status for that of a stage that failed, and say what a killed one could not."""
    if status < 0:
        signal_name = signal.Signals(-status).name
        hint = " (out of memory?)" if signal_name == "SIGKILL" else ""
        sys.stderr.write(f"Error: stage '{name}' was ended by {signal_name}{hint}. {_AGAIN} {run_dir}\n")
    return status if status in (local.USERS_MISTAKE, StageStopped.exit_status) else 1


def _run_one(job: Job, run_dir: Path, executor: Any, stop: local.StopSignals) -> int:
    if not is_local(executor):
        with run.Experiment(f"upcycle-{run_dir.name}-{job.name}", enable_goodbye_message=False) as experiment:
            task = run.Partial(run_stage, name=job.name, dir=str(run_dir))
            mine = sized(executor, job.nodes, job.ranks_per_node)
            identity = experiment.add(task, executor=mine, name=job.name)
            stop.callback = lambda: experiment.cancel(identity)
            experiment.run(tail_logs=True)
        return 0  # its marker says how it ended
    return run_here(job, run_dir, executor, stop)


def run_here(job: Job, run_dir: Path, executor: Any, stop: local.StopSignals, at_once: int = 1) -> int:
    """Run a stage on this machine, beside others that share the cores; return its exit status, as `run_ranks` does.

    Args:
        job: of the stage.
        run_dir: the run's folder.
        executor: whose variables are set, if any.
        stop: the launcher's signals.
        at_once: how many run; where it is not alone, the console is not its own.
    """
    ranks = job.ranks_per_node if job.is_training else None
    variables = performance.variables(performance.settings_here(job)) | variables_for(at_once * (ranks or 1), executor)
    return local.run_ranks(job.command, ranks, variables, logs_of(run_dir, job), stop, is_quiet=at_once > 1)


def logs_of(run_dir: Path, job: Job) -> Path:
    """Return the prefix of a stage's log files."""
    return run_dir / "logs" / job.name


def variables_for(ranks: int, executor: Any) -> dict[str, str]:
    """Return the variables of ranks on this machine: the user's, and as many threads as there are cores for."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // ranks))
    return {"OMP_NUM_THREADS": threads, **(executor.env_vars if executor else {})}


def sized(executor: run.Executor, nodes: int, per_node: int) -> run.Executor:
    """Return a copy of an executor with this many nodes and ranks per node, in the fields that its class has."""
    mine = copy.copy(executor)  # deep enough, as an experiment clones it; and a client of a cloud has no deep copy
    for names, value in ((("nodes", "num_nodes"), nodes), (("ntasks_per_node", "nprocs_per_node"), per_node)):
        for name in names:
            if hasattr(mine, name):
                setattr(mine, name, value)
    return mine


def stopped(signum: int, stages: Sequence[Stage], run_dir: Path, plan: Plan) -> str:
    """Return the last words of a stopped run: what was kept, and how to continue."""
    kept = f"finished stages: {', '.join(finished(run_dir, plan)) or 'none'}"
    for stage in (stage for stage in stages if stage.resumable):
        last = newest_checkpoint(run_dir / stage.name / "checkpoints")
        kept += f"; last checkpoint of {stage.name}: {last}" if last else f"; no checkpoint of {stage.name} yet"
    names = " and ".join(f"'{stage.name}'" for stage in stages)
    return (
        f"\nStopped by {signal.Signals(signum).name} in stage {names}. Kept in {run_dir}: {kept}.\n"
        f"Go on with the same command: {command_line()}\n"
    )
