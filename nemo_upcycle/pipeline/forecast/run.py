"""The forecast of a run, made before anything is submitted or written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.data_stage import data_folder_of
from nemo_upcycle.pipeline.executors.base import Cluster
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.performance import performance_settings_here
from nemo_upcycle.pipeline.forecast.disk import DiskForecast, forecast_disk
from nemo_upcycle.pipeline.forecast.network import NetworkForecast, forecast_network
from nemo_upcycle.pipeline.forecast.stages import TIME, StageForecast, forecast_stages
from nemo_upcycle.pipeline.forecast.training import TrainingForecast, forecast_training
from nemo_upcycle.pipeline.plan import Stage, required_training
from nemo_upcycle.pipeline.rewind import Rewind
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.utils.files import is_complete, size_text
from nemo_upcycle.utils.masking import without_secrets
from nemo_upcycle.utils.progress import duration


#: Origins of a setting: typed by the user, chosen by the chain, or from the recipe.
TYPED, CHAIN, RECIPE = "typed", "chain", "recipe"


#: Rise of the goodput for which a warning recommends another interval between checkpoints.
GAIN = 0.01


@dataclass(frozen=True)
class RunSetting:
    """A setting of a run, for people.

    Args:
        name: name of the setting as an override on the command line.
        value: value as text.
        origin: TYPED, CHAIN or RECIPE.
    """

    name: str
    value: str
    origin: str


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run.

    Args:
        run_dir: the run's folder.
        recipe: name of the recipe.
        stages: forecasts of the chain's stages or of a part of them, in order.
        trainings: forecast of each training, by stage.
        disk: disk space of the run.
        network: items that the stages fetch from networks.
        settings: all settings of the run.
        performance: NVIDIA's performance settings of each training, by stage.
        unchecked: things that were not checked, one line each.
        problems: errors that would stop the run before its end, found by the checks and by `hopeless`.
        read_too_often: one warning for each source of finished data that a training reads more often than allowed.
        now: time at which the run would start.
    """

    run_dir: Path
    recipe: str
    stages: tuple[StageForecast, ...]
    trainings: Mapping[str, TrainingForecast]
    disk: DiskForecast
    network: NetworkForecast
    settings: tuple[RunSetting, ...]
    performance: Mapping[str, Mapping[str, str]]
    unchecked: tuple[str, ...] = ()
    problems: tuple[UpcycleError, ...] = ()
    read_too_often: tuple[str, ...] = ()
    now: datetime = field(default_factory=datetime.now)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about what may go wrong."""
        return tuple(_warnings(self))

    @property
    def misfits(self) -> tuple[str, ...]:
        """Resources that are too small (GPU memory, disk), each with a fix."""
        return (*self.memory_misfits, *map(str, filter(None, [_disk_misfit(self)])))

    @property
    def memory_misfits(self) -> tuple[str, ...]:
        """Trainings that need more memory than their GPUs have. The estimate may be wrong; see `hopeless`."""
        return tuple(
            f"{name}: {_memory_text(training, 'does not fit')}"
            for name, training in self.trainings.items()
            if training.stage.runs and training.is_too_large and not training.is_far_too_large
        )

    @property
    def is_known(self) -> bool:
        """Whether memory and disk are estimated for everything that runs."""
        running = {stage.name for stage in self.stages if stage.runs} & set(self.performance)
        estimated = {name for name, training in self.trainings.items() if training.fullest}
        return running <= estimated and self.disk.free_bytes is not None


def forecast(
    stages: Sequence[Stage],
    run_dir: Path,
    plan: RunPlan,
    cluster: Cluster | None,
    jobs: Sequence[Job],
    typed: Mapping[str, str] | None = None,
    rewind: Rewind | None = None,
) -> Forecast:
    """Forecast a run: its stages, memory, time, cost and disk. Write nothing, and ask no cluster or network.

    Args:
        stages: stages that were asked for: the chain or a part of it.
        run_dir: the run's folder; need not exist.
        plan: checked plan of the run.
        cluster: cluster that runs the stages; None for this machine. The cluster's executor may have a
            `price_per_gpu_hour`, and a `card` as in `nemo-upcycle plan --gpu`.
        jobs: jobs of the stages.
        typed: value of each typed argument or setting.
        rewind: request to rewind a training, or None.

    Example:
        >>> print(render_forecast(forecast(stages, run_dir, plan, None, jobs)))  # doctest: +SKIP
    """
    executor = cluster.executor if cluster else None
    by_name, facts = {job.name: job for job in jobs}, plan.facts
    stage_forecasts = forecast_stages(stages, run_dir, plan, cluster, by_name, rewind)
    trained = [stage for stage in stage_forecasts if stage.name in facts]
    trainings = {
        stage.name: forecast_training(known, stage, executor, _restart_s(by_name[stage.name]))
        for stage in trained
        if (known := facts[stage.name])
    }
    models = {name: known.arch if known else None for name, known in facts.items()}
    holds_back = cluster is not None and cluster.holds_back  # if so, trainings may run in parallel
    disk = forecast_disk(
        run_dir, plan, stage_forecasts, models, trainings, is_parallel=holds_back, is_here=cluster is None
    )
    performance_of = cluster.performance if cluster else performance_settings_here
    performance = {stage.name: performance_of(by_name[stage.name]) for stage in trained}
    running = [stage for stage, found in zip(stages, stage_forecasts, strict=True) if found.runs]
    network = forecast_network(running, plan, cluster, by_name, facts)
    return Forecast(
        run_dir=run_dir,
        recipe=plan.recipe,
        stages=stage_forecasts,
        trainings=trainings,
        disk=disk,
        network=network,
        settings=tuple(_run_settings(plan, [stage.name for stage in trained], typed or {})),
        performance=performance,
        problems=network.problems,
        read_too_often=tuple(_read_too_often(plan, data_folder_of(run_dir, plan), trainings)),
    )


def _read_too_often(plan: RunPlan, folder: Path, trainings: Mapping[str, TrainingForecast]) -> Iterator[str]:
    if plan.inputs.reads_chat or not is_complete(folder):
        return
    blend = open_blend(folder)
    for name, training in trainings.items():
        yield from (f"{name}: {text}" for text in blend.read_too_often(training.tokens))


def _run_settings(plan: RunPlan, stages: Sequence[str], typed: Mapping[str, str]) -> Iterator[RunSetting]:
    """Yield the settings of a run and its trainings; for the second training, only its differences.

    Args:
        plan: plan of the run.
        stages: names of the stages that train.
        typed: value of each typed argument or setting.
    """
    for name in ("dense", "data", "evaluation"):
        if value := getattr(plan, name):
            yield RunSetting(name, without_secrets(value), TYPED if name in typed else CHAIN)
    values: dict[str, str] = {}
    for stage in stages:
        training, prefix = required_training(plan, stage), f"{stage}."
        given = {name.removeprefix(prefix): value for name, value in typed.items() if name.startswith(prefix)}
        own = {**given, **training.named_settings(), **training.shown_settings(plan.inputs.parent)}
        own = {name: str(value) for name, value in own.items()}
        for name, value in own.items():
            if values.get(name) != value or name in given:
                yield RunSetting(prefix + name, without_secrets(value), TYPED if name in given else RECIPE)
        values = values or own


def hopeless(forecast: Forecast) -> Iterator[UpcycleError]:
    """Yield problems that no estimation error explains: a GPU has far too little memory, or a job far too little time.

    Estimates differ from the truth by at most 25 %. A smaller problem is only a warning, or a misfit in a dry run.
    """
    for name, training in forecast.trainings.items():
        if not training.stage.runs:
            continue
        if training.is_far_too_large:
            yield UpcycleError(f"{name}: {_memory_text(training, 'does not fit')}")
        if training.limit_s is not None and (needed_s := training.time_needed_s(training.limit_s)):
            again = "" if training.stage.is_requeued else ", and nothing starts it again"
            yield UpcycleError(
                f"run.executor.stages.{name}.{training.stage.time_setting}",
                kind="state",
                got=f"{training.stage.resources[TIME]} is too short: the stage needs {duration(needed_s)}{again}",
                fix=training.stage.time_fix.format(stage=name),
            )


def check_space(forecast: Forecast, alive: Collection[str] = ()) -> None:
    """Check that a run's disk has room for the files that it writes, as far as their sizes are known.

    Args:
        forecast: forecast of the run.
        alive: stages whose jobs are submitted already; their disk use does not count.

    Raises:
        UpcycleError: the disk has too little space.
    """
    if misfit := _disk_misfit(forecast, alive):
        raise misfit


def _disk_misfit(forecast: Forecast, alive: Collection[str] = ()) -> UpcycleError | None:
    """Return the error of a disk that is too small, or None. The disk use of stages in `alive` does not count."""
    disk = replace(forecast.disk, uses=tuple(use for use in forecast.disk.uses if use.stage not in alive))
    if disk.fits or disk.free_bytes is None:
        return None
    largest = sorted(disk.uses, key=lambda use: use.new_peak_bytes, reverse=True)[:3]
    parts = ", ".join(f"{use.what} {size_text(use.new_peak_bytes)}" for use in largest)
    return UpcycleError(
        f"The disk of {disk.folder}",
        kind="state",
        got=(
            f"has {size_text(disk.free_bytes)} free, and the run in {forecast.run_dir} needs "
            f"{size_text(disk.needed_bytes)} ({parts})"
        ),
        fix="choose a dir on a larger disk, free some space, or run a part of the chain with --until",
    )


def _warnings(forecast: Forecast) -> Iterator[str]:
    for name, training in forecast.trainings.items():
        if training.stage.runs:
            yield from _training_warnings(name, training)
    yield from forecast.read_too_often
    if not forecast.trainings and any(stage.name == "pretrain" and stage.runs for stage in forecast.stages):
        yield "memory, time and sizes are known only after the parent is fetched"
    if len({training.tokens for training in forecast.trainings.values()}) > 1:
        read = " and ".join(f"{training.tokens:,} ({name})" for name, training in forecast.trainings.items())
        yield f"the two models are trained on different numbers of tokens: {read}"
    disk = forecast.disk
    if disk.free_bytes is None:
        yield f"{forecast.run_dir} is not mounted here, so the room on its disk is not known"
    if unknown := [use.unknown for use in disk.uses if use.unknown]:
        yield f"the disk estimate omits items of unknown size: {'; '.join(unknown)}"


def _training_warnings(name: str, training: TrainingForecast) -> Iterator[str]:
    if training.fullest and training.fullest.verdict == "tight":
        yield f"{name}: {_memory_text(training, 'is tight: fragmentation may exceed it')}"
    yield from (f"{name}: {text}" for text in training.facts.warnings)
    if not training.facts.knows_vocabulary:
        yield f"{name}: sizes omit the embeddings, because the vocabulary is known only after the parent is fetched"
    for limit in training.stage.save_limits:
        if training.save_gib_s(limit) > training.write_gib_s:
            size = size_text(training.facts.checkpoint_bytes)
            yield (
                f"{name}: a checkpoint of {size} is saved within {limit.seconds:g} s"
                f" ({limit.what}) only at {training.save_gib_s(limit):.3g} GiB/s or more; otherwise {limit.otherwise}."
                f" At {training.write_gib_s:g} GiB/s, set {limit.fix.format(seconds=training.early_save_s)}"
            )
    every, best = training.facts.saving.every_n_steps, training.best_every_n_steps
    if best and (share := training.goodput(every)) and (most := training.goodput(best) or 0.0) > share + GAIN:
        yield (
            f"{name}: {100 * share:.1f} % of the time would go into steps that are kept, and {100 * most:.1f} % with a"
            f" checkpoint every {best:,} steps: set {name}.{training.facts.saving.setting}={best}"
        )
    loss_s, limit_s = training.longest_loss_s, training.limit_s
    is_cut = limit_s is not None and training.seconds_left is not None and training.seconds_left > limit_s
    if loss_s is not None and limit_s is not None and is_cut and loss_s > limit_s:
        yield (
            f"{name}: the time limit ({limit_s / 60:.0f} min) is shorter than the time between two checkpoints"
            f" ({loss_s / 60:.0f} min). A job may end before it saves anything."
            f" Lower {name}.{training.facts.saving.setting}"
        )


def _restart_s(job: Job) -> float | None:
    """Return the set-up time of a training's last job (seconds); None if it is unknown."""
    started, ready = job.folder / "started", job.run_dir / job.name / "training.json"
    if not (started.is_file() and ready.is_file()):
        return None
    seconds = ready.stat().st_mtime - started.stat().st_mtime
    return seconds if seconds > 0 else None


def _memory_text(training: TrainingForecast, what: str) -> str:
    """Describe how full a GPU is, and name the command that searches for another layout."""
    gib = f"{training.memory_gib:.1f} of {training.gpu.memory_gib if training.gpu else 0} GiB"
    recipe = training.facts.recipe.partition("_pretrain_")[0]  # Bridge's names have a longer end
    search = f"nemo-upcycle plan --recipe {recipe} --gpus {training.facts.layout.gpus}"
    return f"memory {what} ({gib} a GPU); search a layout: `{search}`"
