"""The interface of a training: NeMo and Megatron-Bridge implement it, and all other code uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.planning.layout import CPU_RANKS
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.facts import TrainingFacts
from nemo_upcycle.trainers.settings import STEPS, by_class, free_settings, is_named, step0_settings


#: Environment variable that `ft_launcher` sets for the ranks that it watches: the socket of the watching process.
FT_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training, sorted by how they may change in a run that has started.

    Attributes:
        fixed: override -> value of the settings that the result depends on; they may not change.
        steps: number of optimizer steps, which may grow; 0 if only the recipe knows it.
        free: settings that do not affect the result, such as logs, checkpoint intervals, nodes and workers.
        step0: fixed settings that the step-0 check depends on.
    """

    fixed: dict[str, str]
    steps: int
    free: dict[str, str]
    step0: dict[str, str]

    @classmethod
    def sorted_by(
        cls, values: Mapping[str, str], *, steps: str, free: tuple[str, ...], step0: tuple[str, ...]
    ) -> TrainingSettings:
        """Sort settings by their names into the four fields.

        Args:
            values: override -> value of every setting.
            steps: name of the setting that has the number of steps.
            free: names of free settings; a name that ends with a dot stands for all names that begin with it.
            step0: names of the settings that the step-0 check depends on, in the same form as `free`.
        """

        paths = by_class(values).items()

        def named(names: tuple[str, ...]) -> dict[str, str]:
            return {name: values[name] for name, path in paths if is_named(path, names)}

        others = named((steps, *free))
        fixed = {name: value for name, value in values.items() if name not in others}
        return cls(fixed, int(float(values.get(steps, 0))), named(free), named(step0))

    def sorted_again(self, trainer: str) -> TrainingSettings:
        """Return the settings that an earlier release recorded, sorted by this release's rules.

        Args:
            trainer: `nemo` or `bridge`.
        """
        free, step0 = free_settings(trainer), step0_settings(trainer)
        again = self.sorted_by(self.fixed | self.free, steps=STEPS.of(trainer), free=free, step0=step0)
        return replace(again, steps=self.steps)


class Training(ABC):
    """A training, as all code outside the trainers sees it. Each trainer has one subclass.

    A training is made from a plan's text. `dense_folder` is the folder of the dense parent that the import stage
    found. Some trainers can complete a recipe only with this folder.
    """

    #: Name of the trainer in `trainers/settings.py` and `trainers/commands.py`.
    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_text(cls, text: str) -> Training:
        """Return the training that a plan's text describes."""

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, int]:
        """Number of nodes, and of ranks on each node."""

    @property
    def is_for_gpus(self) -> bool:
        """Whether the training needs GPUs. A training on a CPU has at most `CPU_RANKS` ranks."""
        nodes, per_node = self.ranks
        return nodes * per_node > CPU_RANKS

    @property
    def reads_chat(self) -> bool:
        """Whether the training tunes on conversations instead of training on texts."""
        return False

    @property
    def script(self) -> str | None:
        """The script that was started, if the recipe refers to something defined in that script."""
        return None

    @abstractmethod
    def named_settings(self) -> dict[str, str]:
        """Return every setting that is known without the parent: override -> value."""

    def settings(self) -> TrainingSettings:
        """Return the settings, sorted by whether they may change in a run that has started."""
        steps, free, step0 = STEPS.of(self.name), free_settings(self.name), step0_settings(self.name)
        return TrainingSettings.sorted_by(self.named_settings(), steps=steps, free=free, step0=step0)

    @abstractmethod
    def facts(self, parent: Parent) -> TrainingFacts | None:
        """Return the facts of the training; None if they are not known before the parent is fetched.

        Args:
            parent: the dense parent.
        """

    @abstractmethod
    def shown_settings(self, parent: Parent) -> dict[str, Any]:
        """Return the values of the settings that people look at, by the names of their overrides."""

    @abstractmethod
    def check(self, stage: str) -> None:
        """Check everything that needs neither the parent nor knowledge of this machine.

        Args:
            stage: `pretrain`, or `dense_ct` (which upcycles nothing).

        Raises:
            UpcycleError: a setting is invalid; the text names it.
        """

    @abstractmethod
    def check_parent(self, stage: str, parent: Parent, *, remote: bool) -> None:
        """Check that the training can start from a parent.

        Args:
            stage: name of the stage, see `check`.
            parent: the dense parent.
            remote: whether to fetch a parent that is missing here, and to fail if it cannot be fetched.

        Raises:
            UpcycleError: the training cannot start from this parent.
        """

    @abstractmethod
    def check_here(self, stage: str) -> None:
        """Check that this machine has everything that the training asks for; raise an UpcycleError if not."""

    def problems(self, stage: str, parent: Parent) -> tuple[UpcycleError, ...]:
        """List the problems that would stop the job before its first step, as far as they can be found in advance.

        Args:
            stage: prefix of setting names in errors: `pretrain`, `dense_ct` (see `check`), or an arm of a grid.
            parent: the dense parent.
        """
        return ()

    @abstractmethod
    def seq_length(self, dense_folder: Path) -> int:
        """Return the sequence length (tokens)."""

    @abstractmethod
    def spec(self, dense_folder: Path) -> UpcycleSpec:
        """Return the spec that upcycles the model."""

    @abstractmethod
    def model_config(self, dense_folder: Path, *, dense: bool) -> Any:
        """Return the configuration of the upcycled model, or of its dense parent, for `check_step0`."""

    @abstractmethod
    def train(
        self, folder: Path, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
    ) -> dict[str, Any]:
        """Train on all ranks of a job, resuming where an earlier start stopped.

        Args:
            folder: folder of the stage, for logs and checkpoints.
            dense_folder: the dense parent.
            data_folder: a finished folder of `nemo-upcycle data`.
            suite: folder of the suite that scores the live model, if the recipe asks for a suite.

        Returns:
            On the first rank, the last checkpoint under the key `checkpoint`.

        Raises:
            StageStopped: a signal stopped the training, which can be resumed.
            StageError: the training wrote no checkpoint.
        """


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint with the highest step in the folder of a training's stage.

    Raises:
        StageError: the folder has no checkpoint.
    """
    if checkpoint := newest_checkpoint(folder / "checkpoints"):
        return checkpoint
    raise StageError(f"Folder {folder}", kind="missing", got="has no finished checkpoint", fix="run the stage again")
