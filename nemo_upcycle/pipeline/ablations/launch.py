"""`nemo upcycle ablate`: check every arm, then train them one after the other, or all as jobs of a cluster."""

# No postponed annotations, and Optional[...]: NeMo-Run parses values by them.

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import nemo_run as run

from nemo_upcycle.data.dense import check_address
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.ablations.grid import read_grid
from nemo_upcycle.pipeline.ablations.stages import GridPlan
from nemo_upcycle.pipeline.checks import check_data, check_folder, check_started
from nemo_upcycle.pipeline.context import PipelineContext, entrypoint
from nemo_upcycle.pipeline.executors.base import is_local
from nemo_upcycle.pipeline.executors.local import ended_by_ctrl_c
from nemo_upcycle.pipeline.launch import absolute_argument, jobs_of, launch
from nemo_upcycle.pipeline.order import require_outputs
from nemo_upcycle.pipeline.run_here import check_at_once
from nemo_upcycle.utils.files import MARKER


class AblateContext(PipelineContext):
    """The command line of `nemo upcycle ablate`."""

    options: ClassVar[Mapping[str, str]] = {"--grid": "grid"}


@entrypoint(AblateContext)
def ablate(
    ctx: run.cli.RunContext,
    grid: str,
    dir: str,
    dense: str | None = None,
    data: str | None = None,
    at_once: int = 1,
) -> None:
    """Train every arm of a grid with every seed from one parent on the same data, and compare them.

    Run it again after a stop of any kind, with the same `dir`: what is finished stays, the rest goes on.

    Args:
        ctx: NeMo-Run's context of the command.
        grid: `--grid GRID`: a name in conf/ablations, or a YAML file like those.
        dir: folder of the grid: a new one, an empty one, or the grid's own.
        dense: another dense parent than the grid's.
        data: another blend than the grid's, or a finished folder of `nemo-upcycle data`.
        at_once: trainings that run at the same time on this machine's cores.

    Raises:
        UpcycleError: an arm could not start, or one did not finish.
    """
    run_dir = Path(dir).expanduser().absolute()
    with ended_by_ctrl_c():
        plan = read_grid(
            absolute_argument(grid),
            absolute_argument(dense, folder=True) if dense else None,
            absolute_argument(data, folder=True) if data else None,
        )
        check_started(run_dir, plan)
        if wrong := [*_problems(ctx, run_dir, plan)]:
            raise UpcycleError.together(wrong)
        require_outputs(plan.stages, run_dir, plan)
    check_at_once(at_once, is_here=is_local(ctx.executor))
    sys.stdout.write(_summary(plan, run_dir))
    if ctx.dryrun or not launch(ctx, run_dir, plan, jobs_of(plan.stages, run_dir, plan), at_once=at_once):
        return
    if not ctx.detach:
        sys.stdout.write("\n" + (run_dir / "table" / "table.md").read_text(encoding="utf-8"))


def _problems(ctx: Any, run_dir: Path, plan: GridPlan) -> Iterator[UpcycleError]:
    """Yield why what is left of a grid would not start: parent, data, and of each arm the training."""
    left = [stage.name for stage in plan.stages if not stage.is_done(run_dir, plan)]
    checks: list[Callable[[], object]] = [partial(check_folder, run_dir)]
    if "dense" in left and plan.dense:
        checks.append(partial(check_address, plan.dense, whole=not ctx.dryrun))
    if "data" in left:
        checks.append(partial(check_data, plan.inputs, remote=not ctx.dryrun))
    arms = {cell: f"arms.{about['arm']}" for cell, about in plan.described["cells"].items()} | {"parent": "parent"}
    # Of an arm one training: neither seeds nor lengths decide whether it starts.
    trainings = {f"{plan.name}: {arms[name]}": plan.trainings[name] for name in left if name in arms}
    if is_local(ctx.executor) and not ctx.dryrun:
        checks += [partial(training.check_here, where) for where, training in trainings.items()]
    for check in checks:
        try:
            check()
        except UpcycleError as error:
            yield error
    for where, training in trainings.items():
        yield from training.problems(where, plan.dense)


def _summary(plan: GridPlan, run_dir: Path) -> str:
    """List what will be trained, and what is there already."""
    done = {name for name in plan.cells if (run_dir / name / MARKER).is_file()}
    cells: dict[str, dict[str, Any]] = plan.described["cells"]
    lines = [f"grid {plan.name}: {len(plan.cells)} trainings, {len(done)} finished before"]
    for arm, about in plan.described["arms"].items():
        mine = [one for one in cells.values() if one["arm"] == arm]
        sizes = sorted({one["steps"] * one["tokens_per_step"] for one in mine})
        counts = f"{len(mine)} trainings of {' or '.join(f'{size:,}' for size in sizes)} tokens"
        lines.append(f"  {arm}: {counts}  {about}".rstrip())
    return "\n".join(lines) + "\n"
