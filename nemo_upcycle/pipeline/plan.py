"""The plan of a run, its stages, and the settings that each stage depends on."""

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

#: Module and class of the trainings of each trainer. A trainer is imported only when it is needed.
_TRAININGS = {
    "nemo": ("nemo_upcycle.trainers.nemo.training", "NeMoTraining"),
    "bridge": ("nemo_upcycle.trainers.bridge.training", "BridgeTraining"),
}
PLAN = "pipeline.json"
#: Folder inside a run's folder, with copies of the user's YAML files as they were when the run started.
KEPT = "config"


@dataclass(frozen=True)
class WorkPlan(ABC):
    """Everything that the stages of a run need, as plain values, and the list of stages."""

    #: File of the plan in a run's folder, and the name of this kind of run in messages.
    file: ClassVar[str]
    kind: ClassVar[str]
    #: Fields that may name a user's YAML file, each with the folder of `conf/` that contains the package's own files.
    files: ClassVar[Mapping[str, str]] = {}
    trainer = "nemo"
    #: The user's command to run at each stop and after the stage `last`; empty if there is none.
    notify = ""
    last = ""

    def write(self, run_dir: Path) -> None:
        """Write the plan to a run's folder for the stages to read, together with the settings of its trainings.

        With the settings, a stage that only checks whether trainings are done need not load a recipe. Loading a recipe
        would import the trainer.
        """
        texts = {stage.name: self.training_text(stage.name) for stage in self.stages}
        known = {sha256(text): asdict(self.training_settings(name)) for name, text in texts.items() if text}
        write_json(run_dir / self.file, numbered(asdict(self) | {"training_settings_of": known}))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Read the plan of a run.

        Raises:
            UpcycleError: the plan is damaged, or a newer release wrote it.
        """
        content = read_json(run_dir / cls.file)
        require_known(content, run_dir / cls.file)
        content.pop(KEY, None)
        known = content.pop("training_settings_of", {})
        plan = cls(**{name: value for name, value in content.items() if name not in RETIRED})
        for digest, values in known.items():
            plan._known[digest] = TrainingSettings(**values).sorted_again(plan.trainer)
        return plan

    @cached_property
    def _known(self) -> dict[str, TrainingSettings]:
        """Settings of each training, by the hash of the training's text."""
        return {}

    def with_copies(self, run_dir: Path) -> tuple[Self, dict[Path, str]]:
        """Return the plan with copies in place of the user's YAML files, and the text of each copy by its path.

        A started run therefore does not depend on files that people keep editing. The folder of a copy is named after
        the copy's content, so jobs of an earlier start never read a different copy.

        Args:
            run_dir: the run's folder; paths of the copies are relative to it.
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
        """All stages, each after the stages that it needs."""

    def setting(self, name: str) -> Any:
        """Return a setting as the markers hash it: YAML files and data folders by content, not by name.

        Args:
            name: name of a field, or of a training's stage. The stage's name stands for the training's fixed settings;
                the name with STEPS appended stands for the number of steps.
        """
        if name.endswith(STEPS):
            return self.training_settings(name.removesuffix(STEPS)).steps
        return self.training_settings(name).fixed if self.training_text(name) else self.content_of(name)

    @abstractmethod
    def training_text(self, stage: str) -> str | None:
        """Return the serialised recipe of a stage's training; None if the stage has no training."""

    def training(self, stage: str) -> Training | None:
        """Return the training of a stage, always the same object; None if the stage has no training."""
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
        """Inputs of the stages: parent, data, suite."""

    @cached_property
    def needs(self) -> list[Need]:
        """Everything that the stages need from networks, each item once."""
        return run_needs(self.inputs)

    @cached_property
    def trainings(self) -> dict[str, Training]:
        """Trainings, by the names of their stages."""
        return {stage.name: found for stage in self.stages if (found := self.training(stage.name))}

    @cached_property
    def facts(self) -> dict[str, TrainingFacts | None]:
        """Facts of each training, by stage; None if they are unknown until the parent is fetched."""
        return {name: training.facts(self.inputs.parent) for name, training in self.trainings.items()}

    def training_settings(self, stage: str) -> TrainingSettings:
        """Return the settings of a stage's training; empty settings if the stage has no training."""
        text = self.training_text(stage)
        if not text:
            return TrainingSettings({}, 0, {}, {})
        if sha256(text) not in self._known:
            self._known[sha256(text)] = required_training(self, stage).settings()
        return self._known[sha256(text)]

    def content_of(self, name: str) -> Any:
        """Return a field as the markers hash it: a finished folder by its hash, a user's YAML file by its content.

        Each file is read only once, so later changes of a file do not change this plan.
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
        """Return whether the stages of two plans have equal settings, even if the recipes are written differently."""
        mine, theirs = ({stage.name: stage.free_of(plan) for stage in plan.stages} for plan in (self, other))
        return self.own_settings == other.own_settings and mine == theirs

    @cached_property
    def own_settings(self) -> dict[str, dict[str, str]]:
        """Settings of each stage, by stage, as markers name the settings."""
        return {stage.name: setting_texts(stage.settings_of(self)) for stage in self.stages}

    @cached_property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """For each stage, the stages whose results it reads directly or indirectly, in the plan's order."""
        reads: dict[str, tuple[str, ...]] = {}
        for stage in self.stages:
            direct = stage.after if stage.reads is None else stage.reads
            needed = {*direct, *(name for one in direct for name in reads[one])}
            reads[stage.name] = tuple(name for name in reads if name in needed)
        return reads

    def stage(self, name: str) -> Stage:
        """Return a stage by its name.

        Raises:
            StageError: the plan has no stage of this name.
        """
        stages = {stage.name: stage for stage in self.stages}
        if name not in stages:
            raise StageError.unknown("stage", name, stages)
        return stages[name]


def open_training(trainer: str, text: str) -> Training:
    """Build a training from its text in a plan.

    Args:
        trainer: `nemo` or `bridge`.
        text: recipe, as the trainer's subclass of `Training` serialises it.
    """
    module, name = _TRAININGS[trainer]
    training: Training = getattr(importlib.import_module(module), name).from_text(text)
    return training


def required_training(plan: WorkPlan, stage: str) -> Training:
    """Return the training of a stage that must have one."""
    training = plan.training(stage)
    assert training is not None
    return training


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        name: name of the stage and of its folder.
        work: function that does the work. It takes the run's folder and plan, and returns the values that the marker
            reports.
        after: stages that must be done before this stage.
        settings: fields of the plan that the stage depends on.
        parallel: whether the stage runs on all ranks of the training job.
        resumable: whether a new start resumes the work of a stopped start.
        computes: whether the stage computes with the models of the run. Such a stage needs a GPU if a training of the
            run needs a GPU.
        reads: stages whose outputs this stage opens; if None, the stages in `after`.
        content: function that lists the result files by which other stages identify the stage's result; the function
            takes the run's folder, the plan and the return value of `work`. None if the stage has no result for other
            stages.
        outputs: function that opens the stage's results, and raises an UpcycleError if a result is missing; the
            function takes the run's folder and the plan. None if no other stage opens a result of this stage.
        disk: function that lists the files that the stage writes into the run's folder, for the forecast. The function
            takes the folder, the plan, and the architecture of each training by stage (None before the parent is
            fetched). None if the stage writes almost nothing, or only a training's checkpoints.
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
        """Return the stage's folder in a run."""
        return StageFolder(run_dir, self.name, plan.reads[self.name])

    def inputs(self, run_dir: Path, plan: WorkPlan) -> dict[str, str]:
        """List the stage's inputs: its own settings, and the settings and results of the stages that it reads."""
        return self.folder(run_dir, plan).inputs(plan.own_settings)

    def settings_of(self, plan: WorkPlan) -> dict[str, Any]:
        """Return the values of the stage's settings."""
        return {name: plan.setting(name) for name in self.settings}

    def free_of(self, plan: WorkPlan) -> dict[str, str]:
        """Return the training's settings that do not change its result, as the stage's folder notes them."""
        return setting_texts({self.name: plan.training_settings(self.name).free})

    def is_done(self, run_dir: Path, plan: WorkPlan) -> bool:
        """Return whether the stage finished from its present inputs."""
        return self.folder(run_dir, plan).is_done(self.inputs(run_dir, plan))

    def content_of(self, run_dir: Path, plan: WorkPlan, outputs: Mapping[str, Any]) -> str:
        """Return the hash of the stage's results for other stages, or "". `outputs` is the stage's report."""
        return content_hash(self.content(run_dir, plan, outputs)) if self.content else ""
