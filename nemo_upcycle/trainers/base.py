"""A training as everything outside the trainers sees it: the contract that NeMo and Megatron-Bridge fill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.planning.layout import CPU_RANKS
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.facts import TrainingFacts
from nemo_upcycle.trainers.settings import STEPS, by_class, free_settings, step0_settings


#: Set by NVIDIA's `ft_launcher` for the ranks that it watches: the socket of the process that does.
FT_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training, sorted by how they may change in a run that has started.

    Attributes:
        fixed: override -> value of settings that the result depends on; may not change.
        steps: number of optimizer steps; may grow. 0 if only the recipe knows it.
        free: settings without effect on the result: logs, checkpoints' interval and retention, nodes, workers.
        step0: fixed settings that the check of step 0 depends on.
    """

    fixed: dict[str, str]
    steps: int
    free: dict[str, str]
    step0: dict[str, str]

    @classmethod
    def sorted_by(
        cls, values: Mapping[str, str], *, steps: str, free: tuple[str, ...], step0: tuple[str, ...]
    ) -> TrainingSettings:
        """Sort settings by their names.

        Args:
            values: override -> value of every setting.
            steps: name of the number of steps.
            free: names of free settings; one that ends with a dot stands for all that begin so.
            step0: names of settings that the check of step 0 depends on, in the form of `free`.
        """

        paths = by_class(values).items()

        def named(names: tuple[str, ...]) -> dict[str, str]:
            begun = tuple(one for one in names if one.endswith("."))
            return {name: values[name] for name, path in paths if path in names or path.startswith(begun)}

        others = named((steps, *free))
        fixed = {name: value for name, value in values.items() if name not in others}
        return cls(fixed, int(float(values.get(steps, 0))), named(free), named(step0))


class Training(ABC):
    """What everything outside the trainers asks of a training; one subclass a trainer, made from a plan's text.

    `dense_folder` is the dense parent's, as the import stage found it: recipes of some trainers are complete with it
    alone.
    """

    #: The trainer, as `trainers/settings.py` and `trainers/commands.py` name it.
    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_text(cls, text: str) -> Training:
        """Return the training of a plan's text."""

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, int]:
        """Nodes, and ranks on each."""

    @property
    def is_for_gpus(self) -> bool:
        """Whether it asks for GPUs: a trial on a CPU has at most `CPU_RANKS` ranks."""
        nodes, per_node = self.ranks
        return nodes * per_node > CPU_RANKS

    @property
    def reads_chat(self) -> bool:
        """Whether it tunes on conversations, and does not train on texts."""
        return False

    @property
    def script(self) -> str | None:
        """The script that was started, if the recipe refers to something defined in it."""
        return None

    @abstractmethod
    def named_settings(self) -> dict[str, str]:
        """Return every setting that is known without the parent, by the name of its override."""

    def settings(self) -> TrainingSettings:
        """Return its settings, told apart by whether they may change in a run that has started."""
        steps, free, step0 = STEPS.of(self.name), free_settings(self.name), step0_settings(self.name)
        return TrainingSettings.sorted_by(self.named_settings(), steps=steps, free=free, step0=step0)

    @abstractmethod
    def facts(self, parent: Parent) -> TrainingFacts | None:
        """Say what it is and takes; None where that is not known before the parent is fetched.

        Args:
            parent: the dense parent.
        """

    @abstractmethod
    def shown_settings(self, parent: Parent) -> dict[str, Any]:
        """Return the values of the settings that people look at, by the names of their overrides."""

    @abstractmethod
    def check(self, stage: str) -> None:
        """Check what can be told without the parent and without what the machine has.

        Args:
            stage: `pretrain`, or `dense_ct`, which upcycles nothing.

        Raises:
            UpcycleError: a setting is not valid; the text names it.
        """

    @abstractmethod
    def check_parent(self, stage: str, parent: Parent, *, remote: bool) -> None:
        """Check that the training can start from a parent.

        Args:
            stage: name of the stage, see `check`.
            parent: the dense parent.
            remote: whether to fetch a parent that is not here, and to fail if that is impossible.

        Raises:
            UpcycleError: the training cannot start from it.
        """

    @abstractmethod
    def check_here(self, stage: str) -> None:
        """Check that this machine has what the training asks for, else raise an UpcycleError."""

    def problems(self, stage: str, parent: Parent) -> tuple[UpcycleError, ...]:
        """List all that would keep the job from its first step, as far as it can be told before anything is built.

        Args:
            stage: what stands before its settings in errors: `pretrain`, `dense_ct`, see `check`, or an arm of a grid.
            parent: the dense parent.
        """
        return ()

    @abstractmethod
    def seq_length(self, dense_folder: Path) -> int:
        """Return the tokens of a sequence."""

    @abstractmethod
    def spec(self, dense_folder: Path) -> UpcycleSpec:
        """Give the spec by which the model is upcycled."""

    @abstractmethod
    def model_config(self, dense_folder: Path, *, dense: bool) -> Any:
        """Return the configuration of the upcycled model, or of its dense parent, for `check_step0`."""

    @abstractmethod
    def train(
        self, folder: Path, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
    ) -> dict[str, Any]:
        """Train on all ranks of a job; go on where an earlier start stopped.

        Args:
            folder: folder of the stage, for logs and checkpoints.
            dense_folder: the dense parent.
            data_folder: a finished folder of `nemo-upcycle data`.
            suite: the folder of the suite that scores the live model, where the recipe asks for it.

        Returns:
            On the first rank the last `checkpoint`.

        Raises:
            StageStopped: a signal stopped it; it can go on.
            StageError: it left no checkpoint.
        """


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of the highest step that a training left in its stage's folder.

    Raises:
        StageError: there is none.
    """
    if checkpoint := newest_checkpoint(folder / "checkpoints"):
        return checkpoint
    raise StageError(f"Folder {folder}", kind="missing", got="has no finished checkpoint", fix="run the stage again")
