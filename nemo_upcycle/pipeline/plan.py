"""The plan of a run, what a stage is, and the settings that each stage depends on."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_upcycle.data.finished import MANIFEST
from nemo_upcycle.data.needs import Need
from nemo_upcycle.errors import StageError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.pipeline.disk_use import DiskUse
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.pipeline.markers import RETIRED, STEPS, StageFolder, content_hash, setting_texts, sha256
from nemo_upcycle.pipeline.needs import run_needs
from nemo_upcycle.trainers.base import Training, TrainingSettings
from nemo_upcycle.trainers.facts import TrainingFacts
from nemo_upcycle.utils.conf import conf_text, is_conf_file, read_conf
from nemo_upcycle.utils.files import read_json, sha256_file, write_json
from nemo_upcycle.utils.schema import KEY, numbered, require_known


if TYPE_CHECKING:
    from typing_extensions import Self

#: Trainer -> module and class of its trainings; a trainer is imported when it is asked for.
_TRAININGS = {
    "nemo": ("nemo_upcycle.trainers.nemo.training", "NeMoTraining"),
    "bridge": ("nemo_upcycle.trainers.bridge.training", "BridgeTraining"),
}
PLAN = "pipeline.json"
#: The folder of a run that keeps the user's YAML files as they were when the run started.
KEPT = "config"


@dataclass(frozen=True)
class WorkPlan(ABC):
    """What the stages of a run need to know, as plain values, and which stages there are."""

    #: Its file in a run's folder, and what people call such a run.
    file: ClassVar[str]
    kind: ClassVar[str]
    #: Fields that may name a YAML file of the user's, and the folder of `conf/` with the package's own.
    files: ClassVar[Mapping[str, str]] = {}
    trainer = "nemo"

    def write(self, run_dir: Path) -> None:
        """Write the plan to a folder, where the stages read it, with the settings of its trainings.

        A stage that only looks whether trainings are done then need not load a recipe, which imports its trainer.
        """
        texts = {stage.name: self.training_text(stage.name) for stage in self.stages}
        known = {sha256(text): asdict(self.training_settings(name)) for name, text in texts.items() if text}
        write_json(run_dir / self.file, numbered(asdict(self) | {"training_settings_of": known}))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Read the plan of a run.

        Raises:
            UpcycleError: the plan is damaged, or of a newer release.
        """
        content = read_json(run_dir / cls.file)
        require_known(content, run_dir / cls.file)
        content.pop(KEY, None)
        known = content.pop("training_settings_of", {})
        plan = cls(**{name: value for name, value in content.items() if name not in RETIRED})
        plan._known.update({digest: TrainingSettings(**values) for digest, values in known.items()})
        return plan

    @cached_property
    def _known(self) -> dict[str, TrainingSettings]:
        """By the hash of a training's text, its settings."""
        return {}

    def with_copies(self, run_dir: Path) -> tuple[Self, dict[Path, str]]:
        """Return the plan with the user's YAML files in the run's folder, and the texts of these by their paths.

        A run that has started no longer depends on files that people go on editing. A copy lies in a folder named by
        its content, so that jobs of an earlier start never read another one.

        Args:
            run_dir: the run's folder, which the places start from.
        """
        names, texts = {}, {}
        for name in self.files:
            content = self.content_of(name)
            if isinstance(content, dict):
                text = conf_text(content)
                place = Path(KEPT, sha256(text)[:12], Path(getattr(self, name)).name)
                names[name], texts[place] = str(run_dir / place), text
        return replace(self, **names), texts

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """All stages, each after those that it needs."""

    def setting(self, name: str) -> Any:
        """Return a setting as the markers hash it: the content, not the name, of YAML files and data folders.

        Args:
            name: a field; a training's stage, for its fixed settings; or with STEPS at its end, for how many it takes.
        """
        if name.endswith(STEPS):
            return self.training_settings(name.removesuffix(STEPS)).steps
        return self.training_settings(name).fixed if self.training_text(name) else self.content_of(name)

    @abstractmethod
    def training_text(self, stage: str) -> str | None:
        """Return the text that the training of a stage is made of; None where there is none."""

    def training(self, stage: str) -> Training | None:
        """Return the training of a stage, the same object every time; None where there is none."""
        text = self.training_text(stage)
        if text and text not in self._trainings:
            self._trainings[text] = open_training(self.trainer, text)
        return self._trainings[text] if text else None

    @cached_property
    def _trainings(self) -> dict[str, Training]:
        return {}

    @property
    @abstractmethod
    def inputs(self) -> Inputs:
        """What its stages read: parent, data, suite."""

    @cached_property
    def needs(self) -> list[Need]:
        """What its stages take from networks, each once."""
        return run_needs(self.inputs)

    @cached_property
    def trainings(self) -> dict[str, Training]:
        """By stage, the trainings."""
        return {stage.name: found for stage in self.stages if (found := self.training(stage.name))}

    @cached_property
    def facts(self) -> dict[str, TrainingFacts | None]:
        """Stage -> facts of its training; None for one whose facts are not known before the parent is fetched."""
        return {name: training.facts(self.inputs.parent) for name, training in self.trainings.items()}

    def training_settings(self, stage: str) -> TrainingSettings:
        """Return the settings of the training of a stage; none where it has no training."""
        text = self.training_text(stage)
        if not text:
            return TrainingSettings({}, 0, {}, {})
        if sha256(text) not in self._known:
            self._known[sha256(text)] = required_training(self, stage).settings()
        return self._known[sha256(text)]

    def content_of(self, name: str) -> Any:
        """Return a field as the markers hash it: the hash of a finished folder, the content of a user's YAML file.

        A file is read once: what changes later is not what this plan was made of.
        """
        if name not in self._contents:
            value = getattr(self, name)
            if name in self.files and is_conf_file(value) and Path(value).expanduser().is_file():
                content, _, folder = read_conf(self.files[name], value, name)
                value = content | {"folder": str(folder)}
            elif isinstance(value, str) and (manifest := Path(value) / MANIFEST).is_file():
                value = sha256_file(manifest)
            self._contents[name] = value
        return self._contents[name]

    @cached_property
    def _contents(self) -> dict[str, Any]:
        return {}

    def is_as(self, other: WorkPlan) -> bool:
        """Return whether the stages of two plans have the same inputs, however their recipes are written."""
        mine, theirs = ({stage.name: stage.free_of(plan) for stage in plan.stages} for plan in (self, other))
        return self.own_settings == other.own_settings and mine == theirs

    @cached_property
    def own_settings(self) -> dict[str, dict[str, str]]:
        """By stage, its settings as markers name them."""
        return {stage.name: setting_texts(stage.settings_of(self)) for stage in self.stages}

    @cached_property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """Stage -> stages whose results it reads, directly or not, in their order."""
        reads: dict[str, tuple[str, ...]] = {}
        for stage in self.stages:
            direct = stage.after if stage.reads is None else stage.reads
            needed = {*direct, *(name for one in direct for name in reads[one])}
            reads[stage.name] = tuple(name for name in reads if name in needed)
        return reads

    def stage(self, name: str) -> Stage:
        """Return a stage by its name.

        Raises:
            StageError: the plan has none of that name.
        """
        stages = {stage.name: stage for stage in self.stages}
        if name not in stages:
            raise StageError.unknown("stage", name, stages)
        return stages[name]


def open_training(trainer: str, text: str) -> Training:
    """Return the training of a plan's text.

    Args:
        trainer: `nemo` or `bridge`.
        text: the recipe, as the trainer's subclass writes it.
    """
    module, name = _TRAININGS[trainer]
    training: Training = getattr(importlib.import_module(module), name).from_text(text)
    return training


def required_training(plan: WorkPlan, stage: str) -> Training:
    """Return the training of a stage that has one."""
    training = plan.training(stage)
    assert training is not None
    return training


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: the name of the stage and of its folder.
        work: the function that does it; takes the run's folder and plan, returns what the marker reports.
        after: stages whose results it reads.
        settings: fields of the plan that it depends on.
        parallel: whether it runs on all ranks of the training job.
        resumable: whether a new start continues where a killed one stopped.
        computes: whether it computes with the models of the run: it needs a GPU if a training of the run does.
        reads: stages whose outputs it opens; None: those that it comes after.
        content: the function that lists the files that hold what it left for others, by which these know it; takes the
            run's folder and plan and what its work returned. None: it left nothing.
        outputs: the function that opens what it left and raises an UpcycleError where something is gone; None: it left
            nothing that another stage opens.
        disk: the function that lists what it writes into the run's folder, for the forecast; takes folder, plan, and
            the architectures of the trainings by stage, each None before the parent is fetched. None: next to nothing,
            or a training's checkpoints.
    """

    name: str
    work: Callable[[Path, Any], dict[str, Any]]
    after: tuple[str, ...]
    settings: tuple[str, ...]
    parallel: bool = False
    resumable: bool = False
    computes: bool = False
    reads: tuple[str, ...] | None = None
    content: Callable[[Path, Any, Mapping[str, Any]], Iterable[Path]] | None = None
    outputs: Callable[[Path, Any], object] | None = None
    disk: Callable[[Path, Any, Mapping[str, Architecture | None]], Sequence[DiskUse]] | None = None

    def folder(self, run_dir: Path, plan: WorkPlan) -> StageFolder:
        """Return its folder in a run."""
        return StageFolder(run_dir, self.name, plan.reads[self.name])

    def inputs(self, run_dir: Path, plan: WorkPlan) -> dict[str, str]:
        """List its inputs: settings of its own and of the stages that it reads, and their results."""
        return self.folder(run_dir, plan).inputs(plan.own_settings)

    def settings_of(self, plan: WorkPlan) -> dict[str, Any]:
        """Return the values of its settings."""
        return {name: plan.setting(name) for name in self.settings}

    def free_of(self, plan: WorkPlan) -> dict[str, str]:
        """Return the settings of its training that its result does not depend on, as its folder notes them."""
        return setting_texts({self.name: plan.training_settings(self.name).free})

    def is_done(self, run_dir: Path, plan: WorkPlan) -> bool:
        """Return whether it finished from its present inputs."""
        return self.folder(run_dir, plan).is_done(self.inputs(run_dir, plan))

    def content_of(self, run_dir: Path, plan: WorkPlan, outputs: Mapping[str, Any]) -> str:
        """Return the hash of its results for other stages, whose report is `outputs`; empty if it left none."""
        return content_hash(self.content(run_dir, plan, outputs)) if self.content else ""
