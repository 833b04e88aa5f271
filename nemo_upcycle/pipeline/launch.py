"""Start a run: check it, say what it will do, and submit or run its stages; the same for every trainer and command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.pipeline.checks import check_here, check_run
from nemo_upcycle.pipeline.commands import (
    chain_of,
    check_chain,
    render_jobs,
    run_jobs,
    say_what_is_missing,
    show_result,
    started,
)
from nemo_upcycle.pipeline.executors.base import is_local, masked_executor
from nemo_upcycle.pipeline.executors.local import ended_by_ctrl_c
from nemo_upcycle.pipeline.executors.settings import cluster_for
from nemo_upcycle.pipeline.forecast import Forecast, check_space, check_stages, forecast, render_forecast
from nemo_upcycle.pipeline.forecast.settings import Origins
from nemo_upcycle.pipeline.jobs import jobs_of
from nemo_upcycle.pipeline.order import chosen_stages, require_earlier
from nemo_upcycle.pipeline.plan import Plan, Stage
from nemo_upcycle.pipeline.stages import STAGES, RunPlan


def launch_chain(
    ctx: Any,
    run_dir: Path,
    plan: RunPlan,
    command: Callable[..., None],
    *,
    first: str | None = None,
    last: str | None = None,
    only: str | None = None,
    render: str | None = None,
) -> None:
    """Check a run of the chain, say what it will do, and submit or run its stages.

    Args:
        ctx: NeMo-Run's context of the command.
        run_dir: the run's folder.
        plan: what the stages are given.
        command: the entry point, whose arguments were typed.
        first: name of the stage to start with, or None.
        last: that of the one to end after.
        only: that of the only one, in place of both.
        render: where to write what would be submitted; nothing is submitted then.

    Raises:
        UpcycleError: an argument is not valid, or a stage did not finish.
    """
    stages = chosen_stages(first, last, only)
    cluster = cluster_for(ctx.executor)
    with ended_by_ctrl_c():
        check_run(run_dir, plan, ctx, stages, shown=bool(ctx.dryrun or render))
        require_earlier(stages, run_dir, plan)
    jobs = jobs_of(stages, run_dir, plan)
    if render:
        render_jobs(jobs, cluster, plan, Path(render))
        return
    by_name, origins = {job.name: job for job in jobs}, Origins(sys.argv[1:], command)
    shown = cluster and cluster.masked()
    found = forecast(stages, run_dir, plan, shown, by_name, origins, masked_executor(ctx.executor))
    if ctx.dryrun or not ctx.skip_confirmation:
        sys.stdout.write(render_forecast(found) + "\n")
    if ctx.dryrun:
        if cluster:
            say_what_is_missing("be submitted", lambda: cluster.check_settings(jobs))
        elif is_local(ctx.executor):
            say_what_is_missing("run here", lambda: check_here(plan, stages))
        return
    check_stages(found)
    if launch(ctx, run_dir, plan, stages, forecast=found) and stages[-1] is STAGES[-1] and not ctx.detach:
        show_result(run_dir)


def launch(
    ctx: Any,
    run_dir: Path,
    plan: Plan,
    stages: Sequence[Stage],
    *,
    forecast: Forecast | None = None,
    at_once: int = 1,
) -> bool:
    """Submit the stages of a checked run, or run them here.

    Args:
        ctx: NeMo-Run's context of the command.
        run_dir: the run's folder.
        plan: what the stages are given.
        stages: those to run.
        forecast: of the run, whose disk is checked; None where nothing is known.
        at_once: how many may run at the same time on this machine.

    Returns:
        Whether the user said yes; the stages are then done, or submitted.

    Raises:
        UpcycleError: it cannot start, or a stage did not finish.
    """
    cluster, jobs = cluster_for(ctx.executor), jobs_of(stages, run_dir, plan)
    if cluster:
        cluster.check_settings(jobs)  # before the scheduler is asked anything
    chain = chain_of(cluster, jobs, run_dir, plan)
    if chain:
        check_chain(chain)
    if forecast:
        check_space(forecast, chain.alive() if chain else ())
    if not ctx.may_go_on():
        return False
    with started(run_dir, plan, chain):
        run_jobs(jobs, run_dir, plan, chain, ctx, at_once)
    return True
