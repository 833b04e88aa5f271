"""Check the arguments of a run before anything is written, fetched or launched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nemo_upcycle.data.blend import no_data
from nemo_upcycle.data.chat.finished import open_data
from nemo_upcycle.data.environment import data_python, engine_version
from nemo_upcycle.data.inputs import check_files, require_disjoint
from nemo_upcycle.data.needs import Caches
from nemo_upcycle.data.suites.lm_eval_tasks import check_needs
from nemo_upcycle.data.suites.local_tasks import is_answers, is_text
from nemo_upcycle.errors import UpcycleError, failures
from nemo_upcycle.pipeline.chain import JOBS
from nemo_upcycle.pipeline.executors.base import Cluster
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.site_file import CLUSTERS
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.pipeline.order import kind_of, require_earlier, require_same_work
from nemo_upcycle.pipeline.plan import KEPT, Stage, WorkPlan
from nemo_upcycle.pipeline.rewind import Rewind
from nemo_upcycle.pipeline.stage_jobs import jobs_of
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.sources.find import Parent, is_configuration
from nemo_upcycle.trainers.base import Training
from nemo_upcycle.utils.files import resolved


#: Names of files that a new run's folder may contain: hidden files, files that a run writes before its plan, and logs
#: of the command that starts the run.
_NO_MATTER = re.compile(rf"^(\.|lost\+found$|logs$|{re.escape(JOBS)}$|{KEPT}$)|\.(log|out|err)$")


@dataclass(frozen=True)
class Findings:
    """Result of all checks.

    Args:
        wrong: mistakes in the request, which make a forecast impossible.
        lacking: things that are missing or wrong where the stages would run, and things that would end a training at
            its start.
        jobs: jobs of the stages; empty if they cannot be made.
        unchecked: things that were not checked, one line each.
    """

    wrong: tuple[UpcycleError, ...] = ()
    lacking: tuple[UpcycleError, ...] = ()
    jobs: tuple[Job, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[UpcycleError, ...]:
        """All errors."""
        return (*self.wrong, *self.lacking)


@dataclass(frozen=True, kw_only=True)
class OwnChecks:
    """Additional checks of one kind of run; each check raises an UpcycleError if it fails.

    Args:
        first: checks that need no other check before them.
        then: checks that need correct inputs and recipes.
        rewind: request to rewind a training, or None.
    """

    first: Iterable[Callable[[], object]] = ()
    then: Iterable[Callable[[], object]] = ()
    rewind: Rewind | None = None


def check_work(
    run_dir: Path,
    plan: WorkPlan,
    stages: Sequence[Stage],
    cluster: Cluster | None,
    own: OwnChecks,
    *,
    places: Mapping[str, str],
    starting: Collection[str],
    shown: bool,
) -> Findings:
    """Find everything that would keep stages from working. This is the only list of checks.

    `--dryrun`, `--render` and `--yes` of `nemo upcycle pipeline` and `ablate` call this function. A dry run and
    `--render` only show the work, so they need neither a network nor the cluster's storage. After the checks, all
    three options refuse a run that the forecast calls hopeless (`forecast.run.hopeless`). Only `--yes` asks the
    scheduler (`Cluster.check`), which knows partitions, accounts and limits. With `--render`, a disk that is too small
    causes only a warning, because the jobs may run elsewhere.

    Args:
        run_dir: the run's folder.
        plan: plan of the run.
        stages: stages that were asked for.
        cluster: scheduler that runs the stages; None for this machine.
        own: additional checks of this kind of run.
        places: prefix of the settings of each training in errors, by stage; only these trainings are checked.
        starting: names of the stages whose inputs are checked.
        shown: whether the work is only shown, by a dry run or `--render`.
    """
    network = not shown  # whether the hub and data servers may be asked
    storage = not shown or cluster is None  # whether the storage is mounted here, with the dense weights
    inputs, parent = plan.inputs, plan.inputs.parent
    folders: list[Callable[[], object]] = [partial(check_folder, run_dir)] if storage or is_seen(run_dir) else []
    reads_dense = not {"import", "dense"}.isdisjoint(starting) and bool(parent.address)
    data = [partial(check_data, inputs, remote=network)] if "data" in starting else []
    no_parent = failures([lambda: parent.configured] if reads_dense else [])
    wrong = [*failures(folders), *no_parent, *failures(data), *failures(own.first)]
    if not wrong:
        wrong = failures([partial(check_started, run_dir, plan, own.rewind), *own.then])
    lacking: list[UpcycleError] = []
    if storage and reads_dense and not wrong:
        lacking += failures([lambda: parent.whole])
    for name, where in places.items() if not no_parent else ():
        found = _problems(plan.trainings[name], where, parent)
        lacking += [error for error in found if not _is_in(error, wrong)]
    jobs: list[Job] = []
    no_jobs = failures([lambda: jobs.extend(jobs_of(stages, run_dir, plan))])
    wrong += [error for error in no_jobs if not _is_in(error, wrong)]
    if cluster:
        lacking += cluster.wrong_settings(jobs)
    else:
        lacking += failures(_checks_here(plan, stages, places))
    missing = () if wrong else _unasked(run_dir, plan, cluster, network=network, storage=storage)
    return Findings(tuple(wrong), tuple(lacking), tuple(jobs), tuple(missing))


def _problems(training: Training, where: str, parent: Parent) -> Sequence[UpcycleError]:
    """List everything that would stop a training before its first step, or while its recipe is built."""
    try:
        return training.problems(where, parent)
    except UpcycleError as error:
        return error.parts


def _is_in(error: UpcycleError, others: Sequence[UpcycleError]) -> bool:
    return str(error) in map(str, others)


def _unasked(run_dir: Path, plan: WorkPlan, cluster: Cluster | None, *, network: bool, storage: bool) -> Iterator[str]:
    """Yield a line about each thing that is not checked without a network or the cluster's storage."""
    folder = plan.inputs.parent.folder
    if folder and is_configuration(folder):
        yield f"{folder} has only the parent's config.json; weights and tokenizer are checked when the stage starts"
    needs = [] if network else plan.needs
    if names := [need.what for need in needs if not need.is_in(Caches.of(os.environ))]:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        yield f"whether {names[0]}{more} can be fetched from the network"
    if not storage and not is_seen(run_dir):
        yield f"whether {run_dir} is writable: it is not mounted here"
    if cluster and not storage:
        yield f"whether {cluster.label} accepts these jobs; --yes asks before it submits"


def check_run(
    run_dir: Path,
    plan: RunPlan,
    stages: Sequence[Stage],
    cluster: Cluster | None,
    *,
    detach: bool,
    shown: bool,
    rewind: Rewind | None = None,
) -> Findings:
    """Check a run of the pipeline; see `check_work`.

    Args:
        run_dir: the run's folder.
        plan: plan of the run.
        stages: stages that were asked for.
        cluster: scheduler that runs the stages; None for this machine.
        detach: whether the launcher leaves without waiting for the jobs.
        shown: whether the run is only shown, by a dry run or `--render`.
        rewind: request to rewind a training, or None.
    """
    inputs = plan.inputs
    rewound = rewind.stage if rewind else ""
    is_known = not failures(partial(training.check, name) for name, training in plan.trainings.items())
    left = [one.name for one in stages if one.name == rewound or not (is_known and _is_done(one, run_dir, plan))]
    fetches = cluster is None and not shown and "import" in left
    trainings = plan.trainings.items()
    own: list[Callable[[], object]] = [
        partial(check_detach, detach, cluster),
        partial(check_asked, inputs),
        *(partial(_check_kind_of_data, inputs, name, training) for name, training in trainings),
        *(partial(training.check, name) for name, training in trainings),
    ]
    then: list[Callable[[], object]] = [
        *(partial(training.check_parent, name, inputs.parent, remote=fetches) for name, training in trainings),
        partial(require_earlier, stages, run_dir, plan),
    ]
    return check_work(
        run_dir,
        plan,
        stages,
        cluster,
        OwnChecks(first=own, then=then, rewind=rewind),
        places={name: name for name in plan.trainings if name in left},
        starting=[stage.name for stage in plan.stages],
        shown=shown,
    )


def _is_done(stage: Stage, run_dir: Path, plan: WorkPlan) -> bool:
    try:
        return stage.is_done(run_dir, plan)
    except UpcycleError:  # the inputs cannot be read; another check reports this
        return False


def check_detach(detach: bool, cluster: Cluster | None) -> None:
    """Check that jobs keep running without the launcher if the command has `--detach`.

    Raises:
        UpcycleError: the jobs need the launcher.
    """
    if detach and not (cluster and cluster.can_detach):
        raise UpcycleError(
            "--detach",
            kind="refused",
            got=(
                "needs a cluster's executor "
                f"({' or '.join(cluster.label for cluster in CLUSTERS if cluster.can_detach)})"
            ),
            fix="omit --detach, and start the command inside tmux or with nohup",
        )


def check_demo_data(plan: WorkPlan) -> None:
    """Refuse the demo texts, the default data of a chain, if a training is for GPUs.

    Raises:
        UpcycleError: a training is for GPUs.
    """
    if found := next((name for name, training in plan.trainings.items() if training.is_for_gpus), ""):
        raise no_data(f"{found} trains on GPUs")


def _check_kind_of_data(inputs: Inputs, name: str, training: Training) -> None:
    if training.reads_chat != inputs.reads_chat:
        kinds = ("texts", "conversations")
        raise UpcycleError(
            f"Data {inputs.data}",
            kind="refused",
            got=f"are {kinds[inputs.reads_chat]}, and {name} reads {kinds[training.reads_chat]}",
            fix="name other data. Recipes called ..._sft read conversations, and all other recipes read texts",
        )


def _checks_here(plan: WorkPlan, stages: Sequence[Stage], places: Mapping[str, str]) -> Iterator[Callable[[], object]]:
    """Yield checks that this machine has everything that the stages need. A forecast does not need these things."""
    names = [stage.name for stage in stages]
    if "data" in names:
        yield partial(_check_engine, plan.inputs)
    if "evaluate" in names:
        yield partial(_check_suite, plan.inputs)
    for name, where in places.items():
        yield partial(plan.trainings[name].check_here, where)


def _check_engine(inputs: Inputs) -> None:
    if inputs.blend:
        engine_version(data_python())  # fails if the environment that builds the blend is missing


def _check_suite(inputs: Inputs) -> None:
    config = inputs.suite_config
    check_needs([] if config.local else list(config.tasks), config.files)


def check_started(run_dir: Path, plan: WorkPlan, rewind: Rewind | None = None) -> None:
    """Check that work in a folder was started from the same inputs, before other stages run for hours.

    Args:
        run_dir: the run's folder.
        plan: plan of the run.
        rewind: request to rewind a training, whose settings may differ; or None.

    Raises:
        UpcycleError: resumable stages were started from other inputs, or the folder belongs to another kind of run or
            holds other files.
    """
    _require_own(run_dir, plan)
    if (kind := kind_of(run_dir)) and not isinstance(plan, kind):
        raise UpcycleError(
            f"Folder {run_dir}", kind="state", got=f"is {kind.kind}, not {plan.kind}", fix="choose another dir"
        )
    starts_branch = rewind and rewind.branch(run_dir, plan)
    require_same_work(run_dir, plan, rewind.stage if rewind and starts_branch else "")


def _require_own(run_dir: Path, plan: WorkPlan) -> None:
    """Check that a folder belongs to a run or has no files of the user, so that a run never hides the user's files.

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
            f"Folder {run_dir}",
            kind="state",
            got=f"has other files: {', '.join(foreign[:3])}{more}",
            fix=f"choose another folder, such as dir={run_dir / 'run'}",
        )


def check_asked(inputs: Inputs) -> None:
    """Check that the suite's tasks fit the held-out data, which are documents of texts or answers of conversations.

    Raises:
        UpcycleError: a task needs the other kind of held-out data, or the suite does not exist.
    """
    config = inputs.suite_config
    for task in config.tasks if config.local else ():
        if is_text(task) if inputs.reads_chat else is_answers(task):
            raise UpcycleError(
                f"Suite {inputs.suite}",
                kind="refused",
                got=(
                    f"has the task {task}, which cannot be scored, because the data {inputs.data} hold out only "
                    f"{('answers' if inputs.reads_chat else 'documents')}"
                ),
                fix=f"set evaluation={('answers' if inputs.reads_chat else 'demo')}, or name another suite",
            )


def check_data(inputs: Inputs, *, remote: bool) -> None:
    """Check the training data: a finished folder, a blend with its files, or conversations with their files.

    Args:
        inputs: inputs of the run.
        remote: whether to check remote files as well, which needs the network.
    """
    if inputs.is_finished:
        open_data(inputs.data)
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
    _ = blend.suites  # raises if a suite is missing


def is_seen(run_dir: Path) -> bool:
    """Return whether this machine sees a folder's storage: the folder or a parent folder, except /, exists here."""
    here = next(path for path in (resolved(run_dir), *resolved(run_dir).parents) if path.exists())
    return here != Path(here.anchor)


def check_folder(run_dir: Path) -> None:
    """Check that a run's folder can be written."""
    existing = next(path for path in (resolved(run_dir), *resolved(run_dir).parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return
    got = f"{existing} {'is not writable' if existing.is_dir() else 'is a file'}"
    raise UpcycleError(f"Cannot make dir {run_dir}:", kind="state", got=got, fix="choose another dir")
