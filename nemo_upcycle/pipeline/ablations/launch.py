"""`nemo upcycle ablate`: check every arm, then train the arms on this machine or as jobs of a cluster."""

# Do not postpone annotations in this module: NeMo-Run reads them to parse argument values.

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
    """Train every arm of a grid with every seed, from one parent on the same data, and compare the arms.

    After a stop of any kind, run it again with the same `dir`: finished trainings are kept, and the others resume.

    Args:
        ctx: NeMo-Run's context of the command.
        grid: `--grid GRID`: a name in conf/ablations, or a YAML file of the same form.
        dir: folder of the grid: a new one, an empty one, or the grid's own.
        dense: dense parent, in place of the grid's parent.
        data: blend, or finished folder of `nemo-upcycle data`, in place of the grid's data.
        at_once: trainings that run at the same time on this machine's cores.

    Raises:
        UpcycleError: an arm cannot start, or a training did not finish.
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
    """Check everything that a grid's unfinished stages need: parent, data, cluster, and one training of each arm."""
    left = [stage.name for stage in plan.stages if not stage.is_done(run_dir, plan)]
    arms = {cell: f"arms.{about['arm']}" for cell, about in plan.described["cells"].items()} | {"parent": "parent"}
    # Check one training per arm, because the seed and the length do not change whether an arm can start.
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
    """List the trainings of a grid, and count the finished ones."""
    done = {name for name in plan.cells if (run_dir / name / MARKER).is_file()}
    cells: dict[str, dict[str, Any]] = plan.described["cells"]
    lines = [f"grid {plan.name}: {len(plan.cells)} trainings, {len(done)} finished before"]
    for arm, about in plan.described["arms"].items():
        mine = [one for one in cells.values() if one["arm"] == arm]
        sizes = sorted({one["steps"] * one["tokens_per_step"] for one in mine})
        counts = f"{len(mine)} trainings of {' or '.join(f'{size:,}' for size in sizes)} tokens"
        lines.append(f"  {arm}: {counts}  {about}".rstrip())
    return "\n".join(lines) + "\n"
