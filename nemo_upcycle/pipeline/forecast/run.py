"""The forecast of a run, made before anything is submitted or written: values, and where its settings come from."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_run.cli.cli_parser import parse_factory

from nemo_upcycle.data.dense import is_configuration
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.base import Cluster, is_local
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.performance import PerformanceSetting, settings_here
from nemo_upcycle.pipeline.forecast.advice import advice_of
from nemo_upcycle.pipeline.forecast.disk import DiskForecast, forecast_disk
from nemo_upcycle.pipeline.forecast.network import NetworkForecast, forecast_network
from nemo_upcycle.pipeline.forecast.scores import ScoreForecast, forecast_scores
from nemo_upcycle.pipeline.forecast.stages import StageForecast, forecast_stages
from nemo_upcycle.pipeline.forecast.training import TrainingForecast, forecast_training
from nemo_upcycle.pipeline.plan import Stage, required_training
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.trainers.settings import setting
from nemo_upcycle.utils.files import size_text
from nemo_upcycle.utils.masking import without_secrets


TYPED = "command line"
_OVERRIDE = re.compile(r"(?P<key>[\w.\[\]]+)\s*[-+*/|&]?=")
_INDEX = re.compile(r"\[.*")


@dataclass(frozen=True)
class Setting:
    """A setting of a run, for people.

    Args:
        name: name of its override on the command line.
        value: text of the value.
        origin: place where it was set.
    """

    name: str
    value: str
    origin: str


class Origins:
    """Tells where settings come from.

    Args:
        words: the words of the command line, as they were typed.
        target: the function whose recipe `--factory` names.
    """

    def __init__(self, words: Sequence[str], target: Any) -> None:
        self.typed = {_INDEX.sub("", match["key"]) for word in words if (match := _OVERRIDE.match(word))}
        self.factory = _option(words, "--factory", "-f")
        self.recipe = self.factory.partition("(")[0].strip()
        self.executor = next((word.partition("=")[2] for word in words if word.startswith("run.executor=")), "")
        has_arguments = bool(self.recipe) and self.factory.rstrip() != self.recipe
        #: The recipe without the arguments that were typed; a value that differs from it comes from them.
        self._usual = None
        if has_arguments:
            with contextlib.suppress(Exception):  # a user's factory may need its arguments
                self._usual = parse_factory(target, "", target, self.recipe)

    def of(self, name: str, value: Any, otherwise: str) -> str:
        """Return where a setting comes from.

        Args:
            name: name of the override.
            value: value of the setting.
            otherwise: origin if nobody typed it.
        """
        parts = name.split(".")
        if any(".".join(parts[:number]) in self.typed for number in range(1, len(parts) + 1)):
            return TYPED
        # Overrides of a trainer's own parser are no arguments of the command, so no factory can set them.
        if self._usual is not None and hasattr(self._usual, parts[0]) and setting(self._usual, name) != value:
            return f"{TYPED} (--factory)"
        return otherwise


def _option(words: Sequence[str], *names: str) -> str:
    """Return the value of an option, `--factory NAME` or `--factory=NAME`; empty without one."""
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in names:
            return value if equals else next(iter(words[number + 1 :]), "")
    return ""


@dataclass(frozen=True)
class Forecast:
    """What a run will do.

    Args:
        run_dir: the run's folder.
        recipe: name of its recipe.
        stages: forecasts of the stages, in the order of the chain.
        trainings: stage -> forecast of its training.
        scores: when the scores will be there; None if no stage gives any.
        disk: disk space that the folder needs.
        network: what stages fetch from networks.
        settings: settings that matter, with their origins.
        performance: stage -> NVIDIA's settings of its training.
        advice: whether upcycling is expected to pay with the run's numbers, in a line; "" where nothing is upcycled.
        unchecked: what could not be checked, in a line; "" if everything was.
    """

    run_dir: Path
    recipe: str
    stages: tuple[StageForecast, ...]
    trainings: Mapping[str, TrainingForecast]
    scores: ScoreForecast | None
    disk: DiskForecast
    network: NetworkForecast
    settings: tuple[Setting, ...]
    performance: Mapping[str, Sequence[PerformanceSetting]]
    advice: str
    unchecked: str = ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What will go wrong, or may."""
        return tuple(_warnings(self))


def forecast(
    stages: Sequence[Stage],
    run_dir: Path,
    plan: RunPlan,
    cluster: Cluster | None,
    jobs: Sequence[Job],
    origins: Origins,
    executor: Any = None,
) -> Forecast:
    """Forecast a run: its stages, memory, time, cost and disk. Write nothing, ask no cluster or network.

    Args:
        stages: the part of the chain that was asked for.
        run_dir: the run's folder; need not exist.
        plan: checked plan of the run.
        cluster: cluster that the stages run on; None for this machine or `executor`. Its executor may have `origins`
            (field -> where its value was set), a `price_per_gpu_hour`, and a `card`, a name of
            `nemo-upcycle plan --gpu`.
        jobs: jobs of the stages.
        origins: origins of the overrides that were typed.
        executor: the user's executor, if it has no scheduler of this package.

    Example:
        >>> print(render_forecast(forecast(stages, run_dir, plan, None, jobs, origins)))  # doctest: +SKIP
    """
    executor = cluster.executor if cluster else executor
    by_name, facts = {job.name: job for job in jobs}, plan.facts
    stage_forecasts = forecast_stages(stages, run_dir, plan, cluster, by_name, executor)
    trained = [stage for stage in stage_forecasts if stage.name in facts]
    trainings = {
        stage.name: forecast_training(plan.trainings[stage.name], known, stage, executor)
        for stage in trained
        if (known := facts[stage.name])
    }
    recipes = {stage.name: known.recipe if (known := facts[stage.name]) else plan.recipe for stage in trained}
    settings = list(_run_settings(plan, recipes, origins))
    if cluster:
        settings += _executor_settings(executor, origins, [stage.name for stage in stages])
    models = {name: known.arch if known else None for name, known in facts.items()}
    holds_back = cluster is not None and cluster.holds_back  # then nothing but its inputs holds a training
    disk = forecast_disk(run_dir, plan, stage_forecasts, models, trainings, is_parallel=holds_back)
    scores = forecast_scores(plan.inputs, stage_forecasts, trainings, is_parallel=holds_back)
    here = settings_here if is_local(executor) else lambda _: []
    performance_of = cluster.performance if cluster else here
    performance = {stage.name: performance_of(by_name[stage.name]) for stage in trained}
    running = [stage for stage, found in zip(stages, stage_forecasts, strict=True) if found.runs]
    network = forecast_network(running, plan, cluster, by_name, facts)
    upcycles = any(stage.name == "pretrain" and stage.runs for stage in stage_forecasts)
    return Forecast(
        run_dir=run_dir,
        recipe=plan.recipe,
        stages=stage_forecasts,
        trainings=trainings,
        scores=scores,
        disk=disk,
        network=network,
        settings=tuple(settings),
        performance=performance,
        advice=advice_of(plan.dense, plan.trained_on, facts) if upcycles else "",
        unchecked=unchecked(plan.dense),
    )


def unchecked(dense: str) -> str:
    """Describe in a line what cannot be checked here: a parent whose weights lie elsewhere; "" if all can."""
    folder = Path(dense.removeprefix("hf://")).expanduser()
    if not is_configuration(folder):
        return ""
    return f"{folder} holds the parent's config.json alone: its weights and tokenizer are checked where it is whole"


def _run_settings(plan: RunPlan, recipes: Mapping[str, str], origins: Origins) -> Iterator[Setting]:
    """Yield the settings of a run, and those of its trainings that people look at.

    Args:
        plan: plan of the run.
        recipes: names of the recipes, by the stage of a training.
        origins: the origins of the command.
    """
    for name in ("dense", "trained_on", "data", "evaluation"):
        if value := getattr(plan, name):
            yield Setting(
                name, without_secrets(value), origins.of(name, value, f"recipe {origins.recipe or plan.recipe}")
            )
    for stage, recipe in recipes.items():
        for path, value in required_training(plan, stage).shown_settings(plan.dense).items():
            name = f"{stage}.{path}"
            yield Setting(name, without_secrets(str(value)), origins.of(name, value, f"recipe {recipe}"))


def _executor_settings(executor: Any, origins: Origins, stages: Sequence[str]) -> Iterator[Setting]:
    """Yield the plain settings of an executor that differ from their defaults, and those of its stages.

    Args:
        executor: may have `origins`, by setting where it comes from, and `stages`, by stage what differs there.
        origins: the origins of the command.
        stages: names of those of the forecast; a setting that every one of them sets itself is shown for these alone.
    """
    if not dataclasses.is_dataclass(executor):
        return
    named: Mapping[str, str] = getattr(executor, "origins", {})
    otherwise = f"executor {origins.executor or type(executor).__name__}"
    table: Mapping[str, Mapping[str, Any]] = getattr(executor, "stages", {})
    own = {stage: table.get(stage, {}) for stage in stages}
    common = {
        field.name: value
        for field in dataclasses.fields(executor)
        if (value := getattr(executor, field.name, None)) != field.default
        and not all(field.name in settings for settings in own.values())
    }
    differing = {
        f"stages.{stage}.{name}": value for stage, settings in own.items() for name, value in settings.items()
    }
    for name, value in (common | differing).items():
        if isinstance(value, (str, int, float, bool)) and value != "":
            typed = f"run.executor.{name}"
            yield Setting(
                typed, without_secrets(str(value)), TYPED if typed in origins.typed else named.get(name, otherwise)
            )


def check_space(forecast: Forecast, alive: Collection[str] = ()) -> None:
    """Check that a run's disk has room for what it writes, as far as the sizes are known.

    Args:
        forecast: the forecast of the run.
        alive: stages whose jobs are submitted already; what they need does not count.

    Raises:
        UpcycleError: the disk has too little space.
    """
    disk = replace(forecast.disk, uses=tuple(use for use in forecast.disk.uses if use.stage not in alive))
    if disk.fits:
        return
    largest = sorted(disk.uses, key=lambda use: use.new_peak_bytes, reverse=True)[:3]
    parts = ", ".join(f"{use.what} {size_text(use.new_peak_bytes)}" for use in largest)
    raise UpcycleError(
        f"disk space for {forecast.run_dir} in {disk.folder}",
        got=f"{size_text(disk.free_bytes)} free",
        expected=f"{size_text(disk.needed_bytes)} ({parts})",
        fix="choose a dir on a larger disk, free some space, or run a part of the chain with --until",
    )


def _warnings(forecast: Forecast) -> Iterator[str]:
    if forecast.unchecked:
        yield forecast.unchecked
    for name, training in forecast.trainings.items():
        if training.stage.runs:
            yield from _training_warnings(name, training)
    if not forecast.trainings and any(stage.name == "pretrain" and stage.runs for stage in forecast.stages):
        yield "memory, time and sizes of the trainings are not known before the parent is fetched"
    if len({training.tokens for training in forecast.trainings.values()}) > 1:
        read = " and ".join(f"{training.tokens:,} ({name})" for name, training in forecast.trainings.items())
        yield f"the two models are trained on different numbers of tokens: {read}"
    disk = forecast.disk
    if not disk.fits:
        yield f"the disk is too small: {size_text(disk.needed_bytes)} needed, {size_text(disk.free_bytes)} free"
    if unknown := [use.unknown for use in disk.uses if use.unknown]:
        yield f"the disk needed does not count what has no known size: {'; '.join(unknown)}"


def _training_warnings(name: str, training: TrainingForecast) -> Iterator[str]:
    if training.fullest and training.fullest.verdict != "fits":
        gib = f"{training.memory_gib:.1f} of {training.fullest.request.gpu.memory_gib} GiB"
        what = "does not fit" if training.fullest.verdict == "no" else "is tight: it may run, or fail by fragmentation"
        recipe = training.facts.recipe.partition("_pretrain_")[0]  # the beginning of Bridge's names
        yield (
            f"{name}: memory {what} ({gib} a GPU); search a layout: "
            f"nemo-upcycle plan --recipe {recipe} --gpus {training.facts.layout.gpus}"
        )
    yield from (f"{name}: {text}" for text in training.facts.warnings)
    if not training.facts.knows_vocabulary:
        yield f"{name}: the vocabulary is not known before the parent is fetched; sizes omit the embeddings"
    for limit in training.stage.save_limits:
        if training.save_gib_s(limit) > training.write_gib_s:
            size = size_text(training.facts.checkpoint_bytes)
            yield (
                f"{name}: a checkpoint of {size} is saved within {limit.seconds:g} s"
                f" ({limit.what}) at {training.save_gib_s(limit):.3g} GiB/s or more; else {limit.otherwise};"
                f" at {training.write_gib_s:g} GiB/s it takes {limit.fix.format(seconds=training.early_save_s)}"
            )
    loss_s, limit_s = training.longest_loss_s, training.limit_s
    is_cut = limit_s is not None and training.seconds_left is not None and training.seconds_left > limit_s
    if loss_s is not None and limit_s is not None and is_cut and loss_s > limit_s:
        yield (
            f"{name}: the time limit ({limit_s / 60:.0f} min) is shorter than the time between two checkpoints"
            f" ({loss_s / 60:.0f} min): a job may end before it saved anything;"
            f" lower {name}.{training.facts.save_setting}"
        )
