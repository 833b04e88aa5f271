"""Start a run of any trainer and command: check it, show its forecast, and submit or run its stages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_upcycle.data.readers import format_of
from nemo_upcycle.errors import UpcycleError, failures
from nemo_upcycle.pipeline.chain import JOBS, Chain, recorded_jobs
from nemo_upcycle.pipeline.checks import Findings, check_run
from nemo_upcycle.pipeline.executors.base import Cluster
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.local import StopSignals, ended_by_ctrl_c
from nemo_upcycle.pipeline.executors.site_file import KINDS, cluster_for
from nemo_upcycle.pipeline.forecast.run import Forecast, check_space, forecast, hopeless
from nemo_upcycle.pipeline.forecast.text import render_forecast
from nemo_upcycle.pipeline.live import watched
from nemo_upcycle.pipeline.notify import checked_command, notifying
from nemo_upcycle.pipeline.order import kind_of, read_plan
from nemo_upcycle.pipeline.plan import KEPT, PLAN, Stage, WorkPlan
from nemo_upcycle.pipeline.rewind import REWIND, Rewind
from nemo_upcycle.pipeline.run_here import run_stages
from nemo_upcycle.pipeline.stages import BY_NAME, STAGES, RunPlan
from nemo_upcycle.utils.command_line import COMMAND, CommandLine
from nemo_upcycle.utils.conf import parse_yaml
from nemo_upcycle.utils.console import end_soon
from nemo_upcycle.utils.files import in_use
from nemo_upcycle.utils.masking import without_secrets, write_private
from nemo_upcycle.utils.validation import require_local
from nemo_upcycle.utils.writers import EXPONENT, yaml_text


def absolute_argument(name: str, *, folder: bool = False) -> str:
    """Make an argument that names a folder, a YAML file or a data file absolute, because a job may run elsewhere."""
    if "://" in name:  # an address
        return name
    path = Path(name).expanduser()
    is_path = path.suffix in (".yaml", ".yml") or (
        folder and (path.is_dir() or path.suffix == ".json" or bool(format_of(path.name)))
    )
    return str(path.absolute()) if is_path else name


def launch_chain(
    ctx: Any,
    dir: str,
    plan: RunPlan,
    *,
    stages: Sequence[Stage],
    render: str | None = None,
    rewind: Rewind | None = None,
    wrong: Sequence[UpcycleError] = (),
) -> None:
    """Check a run of the chain, show its forecast, and submit or run its stages.

    Args:
        ctx: NeMo-Run's context of the command.
        dir: the run's folder, as typed.
        plan: plan of the run, with paths as typed.
        stages: the chain or a part of it, in order.
        render: folder for the files that would be submitted; if given, nothing is submitted.
        rewind: request to rewind a training, or None.
        wrong: mistakes that the command itself has found.

    Raises:
        UpcycleError: an argument is invalid, a training would not start, or a stage did not finish.
        SystemExit: the run is only shown, and would not start or would not fit.
    """
    run_dir = Path(dir).expanduser().absolute()
    folders = {name: absolute_argument(getattr(plan, name), folder=True) for name in ("dense", "data")}
    plan = replace(plan, **folders, evaluation=absolute_argument(plan.evaluation))
    cluster, shown = cluster_for(ctx.executor), bool(ctx.dryrun or render)
    with ended_by_ctrl_c():
        wrong = [*wrong, *failures([partial(require_local, "dir", dir), partial(_check_render, render, cluster)])]
        wrong += failures([partial(_check_rewind, rewind, stages, render)])
        wrong += failures([partial(checked_command, plan.notify, is_here=cluster is None)])
        found = check_run(run_dir, plan, stages, cluster, detach=ctx.detach, shown=shown, rewind=rewind)
    if wrong or found.wrong:
        raise UpcycleError.together([*wrong, *found.all])
    command = checked_command(plan.notify, is_here=cluster is None)
    plan, start_branch = replace(plan, notify=command, last=stages[-1].name), None
    if rewind and (branch := rewind.branch(run_dir, plan)):
        start_branch = partial(rewind.start, branch, run_dir)
    elif rewind:
        sys.stderr.write(f"{rewind.stage} was already rewound to step {rewind.step} in this way, and continues.\n")
        rewind = None
    expected, jobs = _forecast(ctx, stages, run_dir, plan, cluster, found, rewind), found.jobs
    if ctx.dryrun and not render:
        sys.stdout.write(render_forecast(expected, verbose=ctx.verbose) + "\n")
        if expected.problems or expected.misfits:
            end_soon()
            raise SystemExit(1)
        return
    if expected.problems:
        raise UpcycleError.together(expected.problems)
    for misfit in expected.misfits if render else expected.memory_misfits:
        sys.stderr.write(f"Warning: {misfit}\n")
    if render and cluster:
        render_jobs(jobs, cluster, plan, Path(render), expected.unchecked)
        return
    if not ctx.skip_confirmation:
        sys.stdout.write(render_forecast(expected, verbose=ctx.verbose) + "\n")
    is_confirmed = launch(ctx, run_dir, plan, jobs, forecast=expected, start_branch=start_branch)
    if is_confirmed and stages[-1] is STAGES[-1] and not ctx.detach:
        report = run_dir / "report.md"
        made, verdict = report.read_text(encoding="utf-8").split("\n\n")[1:3]
        sys.stdout.write(f"\n{made}\n{verdict}\n\nReport: {report.with_suffix('.html')}\n")


def _check_render(render: str | None, cluster: Cluster | None) -> None:
    """Check that `--render` names a local folder, and that the run has a cluster whose jobs can be rendered."""
    if render and cluster is None:
        fix = f"add run.executor={' or run.executor='.join(KINDS)}"
        raise UpcycleError("--render", kind="refused", got="needs a cluster", fix=fix)
    require_local("--render", render or "")


def _check_rewind(rewind: Rewind | None, stages: Sequence[Stage], render: str | None) -> None:
    """Check that a training that is to be rewound also runs."""
    if rewind and render:
        fix = "omit one of them"
        raise UpcycleError(REWIND, kind="refused", got="changes the run, which --render must not do", fix=fix)
    if rewind and rewind.stage in BY_NAME and rewind.stage not in [stage.name for stage in stages]:
        fix = f"omit --from, --until and --only, or let them include {rewind.stage}"
        raise UpcycleError(REWIND, kind="refused", got=f"rewinds {rewind.stage}, which would not run", fix=fix)


def _forecast(
    ctx: Any,
    stages: Sequence[Stage],
    run_dir: Path,
    plan: RunPlan,
    cluster: Cluster | None,
    found: Findings,
    rewind: Rewind | None,
) -> Forecast:
    """Forecast a checked run, and add all problems that the checks and the forecast itself found."""
    shown = cluster and cluster.masked()
    try:
        expected = forecast(stages, run_dir, plan, shown, found.jobs, ctx.typed, rewind)
    except Exception:
        if not found.lacking:
            raise
        raise UpcycleError.together(found.lacking) from None  # these settings allow no forecast
    problems = {str(error): error for error in (*found.lacking, *expected.problems, *hopeless(expected))}
    return replace(expected, problems=tuple(problems.values()), unchecked=found.unchecked)


def launch(
    ctx: Any,
    run_dir: Path,
    plan: WorkPlan,
    jobs: Sequence[Job],
    *,
    forecast: Forecast | None = None,
    at_once: int = 1,
    start_branch: Callable[[WorkPlan], None] | None = None,
) -> bool:
    """Submit the jobs of a checked run, or run them here.

    Args:
        ctx: NeMo-Run's context of the command.
        run_dir: the run's folder.
        plan: plan of the run.
        jobs: jobs to run.
        forecast: forecast of the run, for the check of disk space; if None, the disk space is not checked.
        at_once: jobs that may run at the same time on this machine.
        start_branch: function that takes the plan and rewinds a training; None if nothing is rewound.

    Returns:
        Whether the user confirmed. If so, the stages are done or submitted.

    Raises:
        UpcycleError: a stage cannot start, or did not finish.
    """
    cluster, chain = cluster_for(ctx.executor), None
    if cluster:
        chain = Chain(cluster, jobs, lambda name: plan.stage(name).is_done(run_dir, plan), run_dir)
        chain.check()
    if forecast:
        check_space(forecast, chain.alive() if chain else ())
    if not ctx.confirm():
        return False
    with in_use(run_dir):  # the run's stages read the plan, so no other run may change the plan
        own_plan, copies = plan.with_copies(run_dir)
        _require_no_other_jobs(chain, run_dir, own_plan)
        if start_branch:
            _require_no_jobs(chain, run_dir)
            start_branch(own_plan)
        _write_plan(run_dir, own_plan, copies)
        (run_dir / COMMAND).write_text(f"{CommandLine.typed().anywhere()}\n", encoding="utf-8")
        _write_recipes(run_dir, own_plan)
        price, is_seen = getattr(ctx.executor, "price_per_gpu_hour", None), plan.file == PLAN and not ctx.detach
        page = watched(run_dir, price) if is_seen else nullcontext()
        with notifying(plan, [plan.stage(job.name) for job in jobs], run_dir), page:
            if chain:
                _run_chain(chain, detach=ctx.detach)
            else:
                run_stages(jobs, run_dir, plan, ctx.executor, at_once)
    return True


def _write_recipes(run_dir: Path, plan: WorkPlan) -> None:
    """Write each training's settings to `recipes/STAGE.yaml` for people: one setting per line, as an override."""
    folder = run_dir / "recipes"
    folder.mkdir(exist_ok=True)
    for stage, training in plan.trainings.items():
        settings = without_secrets(training.named_settings())
        lines = [yaml_text({name: _value(text)}, width=sys.maxsize) for name, text in settings.items()]
        (folder / f"{stage}.yaml").write_text("".join(lines), encoding="utf-8")


def _value(text: str) -> Any:
    """Return the value of a setting, or its text if it is not YAML."""
    if EXPONENT.fullmatch(text):
        return float(text)
    try:
        return parse_yaml(text, "setting")
    except UpcycleError:
        return text


def _write_plan(folder: Path, plan: WorkPlan, copies: Mapping[Path, str]) -> None:
    """Write a plan, and the copies of the user's files that the plan names."""
    for place, text in copies.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        write_private(folder / place, text)
    plan.write(folder)


def _require_no_other_jobs(chain: Chain | None, run_dir: Path, plan: WorkPlan) -> None:
    """Check that every waiting or running job would read the plan with which the job was submitted."""
    recorded = recorded_jobs(run_dir)
    if not recorded:
        return
    if chain is None or recorded["cluster"] != chain.cluster.identity:
        raise UpcycleError(
            f"Folder {run_dir}",
            kind="state",
            got=f"has jobs of another scheduler, {recorded['cluster']} ({_listed(recorded['jobs'])})",
            fix=f"make sure that none of these jobs is waiting or running, and delete {run_dir / JOBS}",
        )
    if kind_of(run_dir) and not plan.is_as(read_plan(run_dir)) and (alive := chain.alive()):
        raise UpcycleError(
            f"Folder {run_dir}",
            kind="state",
            got=f"has jobs in the queue that were submitted with other arguments ({_listed(alive)})",
            fix="cancel these jobs, give their arguments again to watch them, or choose another dir",
        )


def _require_no_jobs(chain: Chain | None, run_dir: Path) -> None:
    """Check that no job of a run waits or runs, before the run is rewound."""
    if chain and (alive := chain.alive()):
        raise UpcycleError(
            f"Folder {run_dir}",
            kind="state",
            got=f"has jobs in the queue ({_listed(alive)}), and a run cannot be rewound meanwhile",
            fix="cancel these jobs, or wait until they end",
        )


def _listed(jobs: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {identity}" for name, identity in jobs.items())


def _run_chain(chain: Chain, *, detach: bool) -> None:
    """Submit the jobs of a chain, and watch them unless `detach`."""
    end_soon()
    with StopSignals() as stop:
        chain.adopt()
        chain.submit()
        ids = " ".join(chain.ids.values())
        if detach:
            sys.stderr.write(f"Submitted to the queue: {ids}. The same command without --detach watches them.\n")
            return
        if not chain.watch(stop):
            ids = " ".join(chain.alive().values())
            sys.stderr.write(
                f"\nStopped watching; the jobs continue: {ids} ({chain.run_dir / JOBS}).\n"
                f"Watch them again with the same command: {CommandLine.typed()}\n"
            )
            raise SystemExit(128 + (stop.signum or 0))


def render_jobs(
    jobs: Sequence[Job], cluster: Cluster, plan: RunPlan, folder: Path, unchecked: Sequence[str] = ()
) -> None:
    """Write the files that would be submitted, and the plan that the stages read.

    Args:
        jobs: checked jobs.
        cluster: scheduler of the jobs.
        plan: plan of the run.
        folder: folder for the files.
        unchecked: things that were not checked, one line each.

    Raises:
        UpcycleError: the folder cannot be written.
    """
    try:
        names = [path.name for job in jobs for path in cluster.write(job, folder)]
        for name, text in cluster.render_chain(jobs).items():
            write_private(folder / name, text, private=text != cluster.masked().render_chain(jobs)[name])
            names.append(name)
        plan, copies = plan.with_copies(jobs[0].run_dir)
        _write_plan(folder, plan, copies)
    except OSError as error:
        raise UpcycleError(
            f"--render {folder}", kind="state", got=f"cannot be written: {error.strerror}", fix="name another folder"
        ) from None
    sys.stdout.write(
        f"Written to {folder}: {', '.join(names)}. The jobs read {jobs[0].run_dir / PLAN}: copy {folder / PLAN}"
        f"{f' and {folder / KEPT}' if copies else ''} there before you submit them.\n"
        + "".join(f"Not checked: {text}.\n" for text in unchecked)
    )
