"""What the commands that start a run have in common: its jobs submitted and watched, and its result shown."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.chain import JOBS, Chain, recorded_jobs
from nemo_upcycle.pipeline.executors.base import Cluster, Job
from nemo_upcycle.pipeline.executors.local import StopSignals
from nemo_upcycle.pipeline.executors.settings import KINDS
from nemo_upcycle.pipeline.plan import KEPT, PLAN, Plan
from nemo_upcycle.pipeline.plans import kind_of, read_plan
from nemo_upcycle.pipeline.run_here import run_stages
from nemo_upcycle.utils.console import command_line, end_soon
from nemo_upcycle.utils.files import in_use
from nemo_upcycle.utils.masking import write_private


#: What was typed, in the run's folder.
COMMAND = "command.txt"
#: Where this package lies, if it was not copied into an environment.
CHECKOUT = Path(__file__).resolve().parents[2]


def whole_path(name: str, *, folder: bool = False) -> str:
    """Return the absolute path of an argument that names a folder or a YAML file: a job may run in another folder."""
    path = Path(name).expanduser()
    is_path = path.suffix in (".yaml", ".yml") or (folder and path.is_dir())
    return str(path.absolute()) if is_path else name


def chain_of(cluster: Cluster | None, jobs: Sequence[Job], run_dir: Path, plan: Plan) -> Chain | None:
    """Return the jobs of a run as a chain on a cluster; None without one."""
    if cluster is None:
        return None
    return Chain(cluster, jobs, lambda name: plan.stage(name).is_done(run_dir, plan), run_dir)


def check_chain(chain: Chain) -> None:
    """Check that the scheduler would take the jobs; warn if they run code of this machine that no commit holds.

    Raises:
        UpcycleError: it would not.
    """
    chain.check()
    if _runs_code_of(chain.cluster, [job.name for job in chain.jobs], CHECKOUT):
        _warn_of_uncommitted_code(CHECKOUT)


def _runs_code_of(cluster: Cluster, stages: Sequence[str], folder: Path) -> bool:
    """Return whether jobs run the code of a folder of this machine: with this interpreter, or where they mount it."""
    mounts = [mount.partition(":")[0] for mount in getattr(cluster.executor, "container_mounts", ())]
    mounts += getattr(cluster.executor, "mounts", {}).values()
    uses_this_python = any(cluster.python_of(stage) == sys.executable for stage in stages)
    return uses_this_python or any(folder.is_relative_to(mount) for mount in mounts)


def _warn_of_uncommitted_code(root: Path) -> None:
    """Warn if the package lies in a repository with changes that no commit holds: the jobs run what lies there."""
    command = ["git", "-C", str(root), "status", "--porcelain", "--", "nemo_upcycle", "recipes", "conf"]
    try:
        changed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except FileNotFoundError:  # no git here
        return
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        sys.stderr.write(
            f"Warning: {root} has uncommitted changes ({changed[0][3:]}{more}); "
            "the jobs run the code as it lies there when each of them starts.\n"
        )


@contextmanager
def started(run_dir: Path, plan: Plan, chain: Chain | None) -> Iterator[None]:
    """Hold a run's folder, with its plan and what was typed in it, while the block runs its stages.

    Raises:
        UpcycleError: another command holds it, or jobs of it with another plan still wait or run.
    """
    with in_use(run_dir):  # its stages read the plan, so no other run may change it
        plan, copies = plan.with_copies(run_dir)
        require_no_other_jobs(chain, run_dir, plan)
        _write_plan(run_dir, plan, copies)
        (run_dir / COMMAND).write_text(command_line() + "\n", encoding="utf-8")
        _write_recipes(run_dir, plan)
        yield


def _write_recipes(run_dir: Path, plan: Plan) -> None:
    """Write the settings of each training as `recipes/STAGE.yaml`, for people: one a line, named like its override."""
    folder = run_dir / "recipes"
    folder.mkdir(exist_ok=True)
    for stage in plan.stages:
        if training := plan.training(stage.name):
            lines = [f"{name}: {value}\n" for name, value in training.named_settings().items()]
            (folder / f"{stage.name}.yaml").write_text("".join(lines), encoding="utf-8")


def _write_plan(folder: Path, plan: Plan, copies: Mapping[Path, str]) -> None:
    """Write a plan and the copies of the user's files that it names."""
    for place, text in copies.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")
    plan.write(folder)


def require_no_other_jobs(chain: Chain | None, run_dir: Path, plan: Plan) -> None:
    """Check that no job that still waits or runs would read another plan than it was submitted with."""
    recorded = recorded_jobs(run_dir)
    if not recorded:
        return
    if chain is None or recorded["cluster"] != chain.cluster.identity:
        raise UpcycleError(
            f"dir {run_dir}",
            got=f"jobs submitted to {recorded['cluster']} ({_listed(recorded['jobs'])})",
            expected="none of another scheduler",
            fix=f"see to it that none of them is left there, and delete {run_dir / JOBS}",
        )
    if kind_of(run_dir) and read_plan(run_dir) != plan and (alive := chain.alive()):
        raise UpcycleError(
            f"dir {run_dir}",
            got=f"jobs in the queue, submitted with other arguments ({_listed(alive)})",
            expected="none",
            fix="give the same arguments to watch them, cancel them, or choose another dir",
        )


def _listed(jobs: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {identity}" for name, identity in jobs.items())


def run_jobs(jobs: Sequence[Job], run_dir: Path, plan: Plan, chain: Chain | None, ctx: Any, at_once: int = 1) -> None:
    """Run the jobs of a run: on a cluster where there is a chain, else here.

    Args:
        jobs: of the stages, in order.
        run_dir: the run's folder.
        plan: of the run.
        chain: the same jobs on a cluster.
        ctx: NeMo-Run's context of the command.
        at_once: how many run here at the same time.
    """
    if chain:
        _run_chain(chain, detach=ctx.detach)
    else:
        run_stages(jobs, run_dir, plan, ctx.executor, at_once)


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
            sys.stderr.write(
                f"\nStopped watching; the jobs go on: {' '.join(chain.alive().values())} ({chain.run_dir / JOBS}).\n"
                f"Watch them again with the same command: {command_line()}\n"
            )
            raise SystemExit(128 + (stop.signum or 0))


def say_what_is_missing(what: str, check: Callable[[], None]) -> None:
    """Print what is still to be set, installed or named before the jobs can run.

    Args:
        what: that cannot be done before.
        check: raises an UpcycleError if something is.
    """
    try:
        check()
    except UpcycleError as error:
        sys.stdout.write(f"\nBefore it can {what}: {error}\n")


def render_jobs(jobs: Sequence[Job], cluster: Cluster | None, plan: Plan, folder: Path) -> None:
    """Write what would be submitted, and the plan that the stages read."""
    if cluster is None:
        raise UpcycleError(
            "--render",
            got="no cluster",
            expected=f"run.executor={'|'.join(KINDS)}",
            fix=f"add {' or '.join(f'run.executor={name}' for name in KINDS)}",
        )
    cluster.check_settings(jobs)
    try:
        names = [path.name for job in jobs for path in cluster.write(job, folder)]
        for name, text in cluster.render_chain(jobs).items():
            write_private(folder / name, text, private=text != cluster.masked().render_chain(jobs)[name])
            names.append(name)
        plan, copies = plan.with_copies(jobs[0].run_dir)
        _write_plan(folder, plan, copies)
    except OSError as error:
        raise UpcycleError(
            f"--render {folder}", got=error.strerror, expected="a folder to write to", fix="name another one"
        ) from None
    sys.stdout.write(
        f"Written to {folder}: {', '.join(names)}. The jobs read {jobs[0].run_dir / PLAN}: copy {folder / PLAN}"
        f"{f' and {folder / KEPT}' if copies else ''} there before you submit them.\n"
    )


def show_result(run_dir: Path) -> None:
    """Print the report's first paragraph and where to read on."""
    report = run_dir / "report.md"
    headline = report.read_text(encoding="utf-8").split("\n\n")[1]
    sys.stdout.write(f"\n{headline}\n\nReport: {report}\n")
