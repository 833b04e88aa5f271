"""The plan of a run, what a stage is, and the settings that each stage depends on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_upcycle.data.finished import MANIFEST
from nemo_upcycle.errors import StageError
from nemo_upcycle.pipeline.markers import StageFolder
from nemo_upcycle.pipeline.trainings import Training, open_training
from nemo_upcycle.utils.files import read_json, sha256_file, write_json


if TYPE_CHECKING:
    from typing_extensions import Self

PLAN = "pipeline.json"


@dataclass(frozen=True)
class Plan(ABC):
    """What the stages of a run need to know, as plain values, and which stages there are."""

    #: Its file in a run's folder, and what people call such a run.
    file: ClassVar[str]
    kind: ClassVar[str]

    def write(self, run_dir: Path) -> None:
        """Write the plan to the run's folder, where the stages read it."""
        write_json(run_dir / self.file, asdict(self))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Read the plan of a run."""
        return cls(**read_json(run_dir / cls.file))

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """All stages, each after those that it needs."""

    @abstractmethod
    def setting(self, name: str) -> Any:
        """Return a setting as the markers hash it: the content, not the name, of YAML files and data folders."""

    @abstractmethod
    def training(self, stage: str) -> Training | None:
        """Return the training of a stage; None where there is none."""

    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Return the addresses, names and paths that its stages read: parent, data, evaluation."""

    @property
    @abstractmethod
    def blend(self) -> str | None:
        """The blend that is built; None where a finished folder is used."""

    def stage(self, name: str) -> Stage:
        """Return a stage by its name.

        Raises:
            StageError: the plan has none of that name.
        """
        found = {stage.name: stage for stage in self.stages}
        if name not in found:
            raise StageError.unknown("stage", name, found)
        return found[name]


def required_training(plan: Plan, stage: str) -> Training:
    """Return the training of a stage that has one."""
    training = plan.training(stage)
    assert training is not None
    return training


def data_content(data: str) -> str:
    """Return what tells data from others: the hash of a finished folder's manifest, or of a blend's YAML file."""
    manifest = Path(data) / MANIFEST
    return sha256_file(manifest) if manifest.is_file() else file_content(data)


def file_content(name: str) -> str:
    """Return the hash of a YAML file in the place of its path; any other text as it is."""
    is_file = name.endswith((".yaml", ".yml")) and Path(name).expanduser().is_file()
    return sha256_file(Path(name).expanduser()) if is_file else name


@dataclass(frozen=True)
class RunPlan(Plan):
    """Everything that the stages of a run need to know, as plain values.

    Recipes are texts, of NeMo in NeMo-Run's own serialised form: a stage builds them only after it has checked that
    it may start.

    Args:
        recipe: name of the upcycling recipe, for titles.
        dense: address of the dense parent.
        data: a blend (a name in `conf/data`, or a YAML file), or a finished folder of `nemo-upcycle data`.
        evaluation: a name in `conf/evaluation`, or a YAML file.
        pretrain: the recipe of the upcycled model, as its trainer writes it.
        dense_ct: the recipe of the dense baseline; None omits it.
        trainer: `nemo` or `bridge`.
    """

    file: ClassVar[str] = PLAN
    kind: ClassVar[str] = "a run of the pipeline"

    recipe: str
    dense: str
    data: str
    evaluation: str
    pretrain: str
    dense_ct: str | None
    trainer: str = "nemo"

    def setting(self, name: str) -> Any:
        """See `Plan.setting`: a field."""
        value = getattr(self, name)
        if name == "data":
            return data_content(value)
        return file_content(value) if isinstance(value, str) else value

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `Plan.stages`: the chain."""
        from nemo_upcycle.pipeline.stages import STAGES

        return STAGES

    def training(self, stage: str) -> Training | None:
        """See `Plan.training`."""
        text = {"pretrain": self.pretrain, "dense_ct": self.dense_ct}.get(stage)
        return open_training(self.trainer, text) if text else None

    def inputs(self) -> tuple[str, ...]:
        """See `Plan.inputs`."""
        return self.dense, self.data, self.evaluation

    @property
    def blend(self) -> str | None:
        """See `Plan.blend`."""
        return None if Path(self.data).is_dir() else self.data


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: of the stage and of its folder.
        work: the function that does it; takes the run's folder and plan, returns what the marker reports.
        after: stages whose results it reads.
        settings: fields of the plan that it depends on.
        parallel: whether it runs on all ranks of the training job.
        resumable: whether a new start continues where a killed one stopped.
    """

    name: str
    work: Callable[[Path, Any], dict[str, Any]]
    after: tuple[str, ...]
    settings: tuple[str, ...]
    parallel: bool = False
    resumable: bool = False

    def folder(self, run_dir: Path) -> StageFolder:
        """Return its folder in a run."""
        return StageFolder(run_dir, self.name, self.after)

    def settings_of(self, plan: Plan) -> dict[str, Any]:
        """Return the values of its settings."""
        return {name: plan.setting(name) for name in self.settings}

    def is_done(self, run_dir: Path, plan: Plan) -> bool:
        """Return whether it finished from its present inputs; the stages before it must be done."""
        folder = self.folder(run_dir)
        return folder.is_done(folder.inputs(self.settings_of(plan)))
