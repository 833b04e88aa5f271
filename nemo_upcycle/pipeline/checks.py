"""Check the arguments of a run before anything is written, fetched or launched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import no_data
from nemo_upcycle.data.chat.finished import open_chat
from nemo_upcycle.data.dense import check_address
from nemo_upcycle.data.environment import data_python, engine_version
from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.data.inputs import check_files, require_disjoint
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.chain import JOBS
from nemo_upcycle.pipeline.executors.settings import CLUSTERS, cluster_for
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.pipeline.markers import StageFolder
from nemo_upcycle.pipeline.order import kind_of, require_same_work
from nemo_upcycle.pipeline.plan import KEPT, Stage, WorkPlan
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.planning.advice import known_parent_tokens
from nemo_upcycle.suites.lm_eval_tasks import check_needs
from nemo_upcycle.suites.local_tasks import is_answers, is_text
from nemo_upcycle.suites.suite_config import read_suite_config
from nemo_upcycle.trainers.base import Training
from nemo_upcycle.utils.files import resolved


#: Names that a new run's folder may hold: hidden files, what a run writes before its plan, a log of who starts it.
_NO_MATTER = re.compile(rf"^(\.|lost\+found$|logs$|{re.escape(JOBS)}$|{KEPT}$)|\.(log|out|err)$")


def check_run(run_dir: Path, plan: RunPlan, ctx: Any, stages: Sequence[Stage], *, shown: bool = False) -> None:
    """Check every argument of the pipeline.

    Args:
        run_dir: the run's folder.
        plan: plan of the run.
        ctx: NeMo-Run's context of the command.
        stages: stages that will run.
        shown: whether the run is only shown: then neither the network nor this machine needs to have what it takes.

    Raises:
        UpcycleError: an argument is not valid; the text names it.
    """
    cluster = cluster_for(ctx.executor)
    if not (shown and cluster):  # its storage may not be mounted where it is only shown
        check_folder(run_dir)
    if ctx.detach and not (cluster and cluster.can_detach):
        raise UpcycleError(
            "--detach",
            got="an executor that needs the launcher",
            expected=" or ".join(cluster.label for cluster in CLUSTERS if cluster.can_detach),
            fix="omit it, and start the command inside tmux or with nohup",
        )
    inputs = plan.inputs
    check_address(inputs.dense, whole=not shown)
    check_data(inputs, remote=not shown)
    check_asked(inputs)
    known_parent_tokens(plan.dense, plan.trained_on)
    is_here = cluster is None and not shown
    if is_here:
        check_here(plan, stages)
    check_trainings(plan, lambda name, training: training.check(name))
    for name, training in plan.trainings.items():
        if training.reads_chat != inputs.reads_chat:
            kinds = ("texts", "conversations")
            raise UpcycleError(
                "data",
                got=f"{inputs.data}: {kinds[inputs.reads_chat]}",
                expected=f"{kinds[training.reads_chat]}, which {name} reads",
                fix="name other data, or take a recipe that tunes (..._sft) or one that does not",
            )
    check_started(run_dir, plan)
    imports = any(stage.name == "import" for stage in stages) and not StageFolder(run_dir, "import").marker.is_file()
    starts = [] if shown else [stage.name for stage in stages if not stage.folder(run_dir, plan).marker.is_file()]
    remote = is_here and imports
    check_trainings(plan, lambda name, training: training.check_parent(name, plan.dense, remote=remote), starts)


def check_demo_data(plan: WorkPlan) -> None:
    """Refuse the demo's texts, which a chain reads unless it names data, if a training is for GPUs.

    Raises:
        UpcycleError: a training is for GPUs.
    """
    if found := next((name for name, training in plan.trainings.items() if training.is_for_gpus), ""):
        raise no_data(f"{found} trains on GPUs")


def check_trainings(plan: RunPlan, check: Callable[[str, Training], None], starts: Collection[str] = ()) -> None:
    """Check all trainings, and that those which are to start will get to their first step.

    Args:
        plan: plan of the run.
        check: given a stage's name and its training, raises an UpcycleError if that is wrong.
        starts: names of stages that are about to run.

    Raises:
        UpcycleError: a training is wrong, or would not start; the text lists all that is wrong.
    """
    found: list[UpcycleError] = []
    for name, training in plan.trainings.items():
        try:
            check(name, training)
            found += training.problems(name, plan.dense) if name in starts else ()
        except UpcycleError as error:
            found += training.problems(name, plan.dense) or (error,)
    if found:
        raise UpcycleError.together(found)


def check_here(plan: RunPlan, stages: Sequence[Stage]) -> None:
    """Check that this machine has what its stages need; a forecast does not ask for it.

    Raises:
        UpcycleError: this machine does not have it.
    """
    names = [stage.name for stage in stages]
    if plan.inputs.blend and "data" in names:
        engine_version(data_python())  # of what builds the blend
    if "evaluate" in names:
        config = plan.inputs.suite_config
        check_needs([] if config.local else list(config.tasks), config.files)
    for name, training in plan.trainings.items():
        if name in names:
            training.check_here(name)


def check_started(run_dir: Path, plan: WorkPlan) -> None:
    """Check before hours of other stages that the work in a folder was started from the same inputs.

    Raises:
        UpcycleError: resumable stages were started from others, or the folder is of another kind of run, or of
            something else.
    """
    _require_own(run_dir, plan)
    if (kind := kind_of(run_dir)) and not isinstance(plan, kind):
        raise UpcycleError(
            f"dir {run_dir}", got=kind.kind, expected=f"{plan.kind}, or a new folder", fix="choose another"
        )
    require_same_work(run_dir, plan)


def _require_own(run_dir: Path, plan: WorkPlan) -> None:
    """Check that a folder is a run's or holds no files of the user's, which a run's files would bury.

    Raises:
        UpcycleError: the folder holds other files.
    """
    folders = [stage.folder(run_dir, plan) for stage in plan.stages]
    begun = any(inputs is not None for one in folders for inputs in (one.done_from(), one.started_from()))
    if begun or kind_of(run_dir) or not run_dir.is_dir():
        return
    foreign = sorted(path.name for path in run_dir.iterdir() if not _NO_MATTER.search(path.name))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UpcycleError(
            f"dir {run_dir}",
            got=f"a folder with {', '.join(foreign[:3])}{more}",
            expected="a new folder, an empty one, or a run's",
            fix=f"choose another: dir={run_dir / 'run'}",
        )


def check_asked(inputs: Inputs) -> None:
    """Check that the data hold back what a suite asks for: documents of texts, or answers of conversations.

    Raises:
        UpcycleError: a task asks what is not held back, or there is no such suite.
    """
    config = inputs.suite_config
    for task in config.tasks if config.local else ():
        if is_text(task) if inputs.reads_chat else is_answers(task):
            raise UpcycleError(
                f"evaluation {inputs.suite}",
                got=task,
                expected=f"no such task: {inputs.data} holds back {'answers' if inputs.reads_chat else 'documents'}",
                fix=f"name evaluation={'answers' if inputs.reads_chat else 'demo'}, or another suite",
            )


def check_data(inputs: Inputs, *, remote: bool) -> None:
    """Check what a run is trained on: a finished folder, or a blend or conversations and their files.

    Args:
        inputs: inputs of the run.
        remote: whether to ask for files behind addresses, too, which needs the network.
    """
    if inputs.is_finished:
        (open_chat if inputs.reads_chat else open_blend)(inputs.data)
    if inputs.chat:
        inputs.chat.paths(fetch=False)
    if (blend := inputs.blend) is None:
        return
    listed = {
        name: check_files(blend, name)
        for name, source in blend.config.sources.items()
        if remote or not any("://" in entry for entry in (*source.train, *source.validation, *source.heldout))
    }
    require_disjoint(listed)
    for suite in blend.config.decontaminate:
        read_suite_config(suite)


def check_folder(run_dir: Path) -> None:
    """Check that a run can be written there."""
    existing = next(path for path in (resolved(run_dir), *resolved(run_dir).parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return
    got = f"{existing} {'is not writable' if existing.is_dir() else 'is a file'}"
    raise UpcycleError(f"dir {run_dir}", got=got, expected="a writable folder", fix="choose another dir")
