"""Read the plan of a run. Find the stages of a part of the chain, and the stages that must be done before them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.ablations.stages import GridPlan
from nemo_upcycle.pipeline.markers import require_same
from nemo_upcycle.pipeline.plan import Stage, WorkPlan
from nemo_upcycle.pipeline.rewind import require_moved
from nemo_upcycle.pipeline.stages import BY_NAME, STAGES, RunPlan


def kind_of(run_dir: Path) -> type[WorkPlan] | None:
    """Return the kind of the plan in a run's folder; None if the folder has no plan."""
    kinds: tuple[type[WorkPlan], ...] = (RunPlan, GridPlan)
    return next((kind for kind in kinds if (run_dir / kind.file).is_file()), None)


def read_plan(run_dir: Path) -> WorkPlan:
    """Read the plan of a run."""
    return (kind_of(run_dir) or RunPlan).read(run_dir)


def before(plan: WorkPlan, *names: str) -> tuple[Stage, ...]:
    """Return the stages that must be done before the named stages, in order and without the named stages themselves.

    The result contains every stage in a named stage's `after`. The result also contains every stage whose result a
    named stage, or a stage in `after`, reads directly or indirectly. Therefore, a lost result of a check stops only
    the training right after the check.
    """
    needed: set[str] = set()
    for stage in (plan.stage(name) for name in names):
        needed.update(plan.reads[stage.name], *({one, *plan.reads[one]} for one in stage.after))
    return tuple(stage for stage in plan.stages if stage.name in needed.difference(names))


def chosen_stages(first: str | None, last: str | None, only: str | None) -> tuple[Stage, ...]:
    """Return the stages of a part of the chain.

    Args:
        first: name of the first stage; if None, the first stage of the chain.
        last: name of the last stage; if None, the last stage of the chain.
        only: name of the only stage, in place of first and last.

    Raises:
        UpcycleError: a name is unknown, or names contradict each other.
    """
    for option, name in (("--from", first), ("--until", last), ("--only", only)):
        if name is not None and name not in BY_NAME:
            raise UpcycleError.unknown(f"{option}: stage", name, BY_NAME)
    if only and (first or last):
        raise UpcycleError(
            "--only", kind="refused", got="cannot be combined with --from or --until", fix="omit --from and --until"
        )
    names = list(BY_NAME)
    start, stop = names.index(first or only or names[0]), names.index(last or only or names[-1])
    if start > stop:
        later = ", ".join(names[start:])
        raise UpcycleError("--until", got=last, expected=f"{first} or a later stage", fix=f"name one of {later}")
    return STAGES[start : stop + 1]


def require_earlier(stages: Sequence[Stage], run_dir: Path, plan: WorkPlan) -> None:
    """Check that the stages that a part of the chain needs are done, and that their results still exist.

    Raises:
        UpcycleError: a stage is not done, was done from other inputs, or its result is missing.
    """
    needed = before(plan, *(stage.name for stage in stages))
    if missing := unfinished(needed, run_dir, plan):
        raise UpcycleError(
            f"Stage '{missing}' in {run_dir}",
            kind="state",
            got=f"did not finish, or finished with other inputs, and '{stages[0].name}' needs it",
            fix=f"start with that stage: --from {missing}",
        )
    require_outputs(stages, run_dir, plan)


def require_outputs(stages: Sequence[Stage], run_dir: Path, plan: WorkPlan) -> None:
    """Check that the results of finished stages still exist, if a stage that has to run reads them.

    Raises:
        UpcycleError: a result is missing.
    """
    done = finished(run_dir, plan)
    for stage in stages:
        names = (stage.after if stage.reads is None else stage.reads) if stage.name not in done else ()
        for read in (plan.stage(name) for name in names if name in done):
            try:
                if read.outputs:
                    read.outputs(run_dir, plan)
            except UpcycleError as error:
                start = f"start with that stage: --from {read.name}" if read.name in BY_NAME else "start again"
                raise UpcycleError(
                    f"Stage '{stage.name}'",
                    kind="state",
                    got=f"cannot read the outputs of stage '{read.name}' in {run_dir}: {error.problem}",
                    fix=f"restore the outputs, or delete {read.folder(run_dir, plan).path} and {start}",
                ) from None


def require_same_work(run_dir: Path, plan: WorkPlan, rewound: str = "") -> None:
    """Check that resumable stages would resume with the inputs with which their work was started.

    Args:
        run_dir: the run's folder.
        plan: plan of the run.
        rewound: name of a stage that will be rewound, which has its own check.

    Raises:
        UpcycleError: some work has other inputs, a note of a start is damaged, or a rewind was interrupted.
    """
    stages = [stage for stage in plan.stages if stage.resumable and stage.name != rewound]
    for stage in stages:
        require_moved(stage.folder(run_dir, plan).path)
    require_same({stage.folder(run_dir, plan): stage.inputs(run_dir, plan) for stage in stages})


def finished(run_dir: Path, plan: WorkPlan) -> list[str]:
    """Return the names of the stages that are done from their present inputs, in order."""
    return [stage.name for stage in plan.stages if stage.is_done(run_dir, plan)]


def unfinished(stages: Sequence[Stage], run_dir: Path, plan: WorkPlan) -> str | None:
    """Return the first of these stages that is not done from its present inputs; None if all are done."""
    return next((stage.name for stage in stages if not stage.is_done(run_dir, plan)), None)
