"""`nemo upcycle ablate`: check every arm, then train them one after the other, or all as jobs of a cluster."""

# No postponed annotations, and Optional[...]: NeMo-Run parses values by them.

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import nemo_run as run

from nemo_upcycle.errors import UpcycleError, failures
from nemo_upcycle.pipeline.ablations.grid import read_grid
from nemo_upcycle.pipeline.ablations.stages import GridPlan
from nemo_upcycle.pipeline.checks import Findings, OwnChecks, check_detach, check_work
from nemo_upcycle.pipeline.context import PipelineContext, entrypoint
from nemo_upcycle.pipeline.executors.base import Cluster
from nemo_upcycle.pipeline.executors.local import ended_by_ctrl_c
from nemo_upcycle.pipeline.executors.site_file import cluster_for
from nemo_upcycle.pipeline.launch import absolute_argument, launch
from nemo_upcycle.pipeline.order import require_outputs
from nemo_upcycle.pipeline.run_here import check_at_once
from nemo_upcycle.utils.files import MARKER
from nemo_upcycle.utils.validation import require_local


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
    run_dir, cluster = Path(dir).expanduser().absolute(), cluster_for(ctx.executor)
    with ended_by_ctrl_c():
        plan = read_grid(
            absolute_argument(grid),
            absolute_argument(dense, folder=True) if dense else None,
            absolute_argument(data, folder=True) if data else None,
        )
        found = _check(run_dir, plan, cluster, detach=ctx.detach, dryrun=ctx.dryrun)
        wrong = failures(
            [partial(require_local, "dir", dir), partial(check_at_once, at_once, is_here=cluster is None)]
        )
        if wrong or found.all:
            raise UpcycleError.together([*wrong, *found.all])
    sys.stdout.write(_summary(plan, run_dir))
    if ctx.dryrun:
        sys.stdout.write("".join(f"Not checked: {text}.\n" for text in found.unchecked))
        return
    if launch(ctx, run_dir, plan, found.jobs, at_once=at_once) and not ctx.detach:
        sys.stdout.write("\n" + (run_dir / "table" / "table.md").read_text(encoding="utf-8"))


def _check(run_dir: Path, plan: GridPlan, cluster: Cluster | None, *, detach: bool, dryrun: bool) -> Findings:
    """Check what is left of a grid: parent, data, the cluster, and one training of each arm."""
    left = [stage.name for stage in plan.stages if not stage.is_done(run_dir, plan)]
    arms = {cell: f"arms.{about['arm']}" for cell, about in plan.described["cells"].items()} | {"parent": "parent"}
    # Of an arm one training: neither seeds nor lengths decide whether it starts.
    places = {f"{plan.name}: {arms[name]}": name for name in left if name in arms}
    return check_work(
        run_dir,
        plan,
        plan.stages,
        cluster,
        OwnChecks(
            first=[partial(check_detach, detach, cluster)],
            then=[partial(require_outputs, plan.stages, run_dir, plan)],
        ),
        places={name: where for where, name in places.items()},
        starting=left,
        shown=dryrun,
    )


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
