"""A training as the stages and jobs of a run see it, whatever trains: NeMo or Megatron-Bridge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import StageError
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.spec import UpcycleSpec


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training, by what may happen to them in a run that has started.

    Attributes:
        fixed: what the result depends on, by the name of its override; may not change.
        steps: how many optimizer steps it takes; may grow. 0 where the recipe alone knows.
        free: what the result does not depend on: logs, checkpoints' interval and retention, nodes, workers.
        step0: of the fixed ones those that the check of step 0 depends on.
    """

    fixed: dict[str, str]
    steps: int
    free: dict[str, str]
    step0: dict[str, str]

    @classmethod
    def sorted_by(
        cls, values: Mapping[str, str], *, steps: str, free: tuple[str, ...], step0: tuple[str, ...]
    ) -> TrainingSettings:
        """Return settings, told apart by their names.

        Args:
            values: every setting, by the name of its override.
            steps: the name of the number of steps.
            free: names, or with a dot at the end their beginnings, of those that are free.
            step0: the same of those that the check of step 0 depends on.
        """

        def are(names: tuple[str, ...]) -> dict[str, str]:
            return {
                name: value
                for name, value in values.items()
                if any(name == one or (one.endswith(".") and name.startswith(one)) for one in names)
            }

        others = are((steps, *free))
        fixed = {name: value for name, value in values.items() if name not in others}
        return cls(fixed, int(float(values.get(steps, 0))), are(free), are(step0))


class Training(ABC):
    """What a stage asks of a training; one subclass a trainer, made from the text in a run's plan.

    `dense_folder` is the dense parent's, as the import stage found it: recipes of some trainers are complete with it
    alone.
    """

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, int]:
        """Nodes, and ranks on each."""

    @property
    def script(self) -> str | None:
        """The script that was started, if the recipe refers to something defined in it."""
        return None

    @abstractmethod
    def settings(self) -> TrainingSettings:
        """Return its settings, told apart by whether they may change in a run that has started."""

    @abstractmethod
    def seq_length(self, dense_folder: Path) -> int:
        """Return the tokens of a sequence."""

    @abstractmethod
    def spec(self, dense_folder: Path) -> UpcycleSpec:
        """Return how the model is upcycled."""

    @abstractmethod
    def model_config(self, dense_folder: Path, *, dense: bool) -> Any:
        """Return the configuration of the upcycled model, or of its dense parent, for `check_step0`."""

    @abstractmethod
    def train(
        self, folder: Path, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
    ) -> dict[str, Any]:
        """Train on all ranks of a job; go on where an earlier start stopped.

        Args:
            folder: of the stage, for logs and checkpoints.
            dense_folder: the dense parent.
            data_folder: a finished folder of `nemo-upcycle data`.
            suite: the folder of the suite that scores the live model, where the recipe asks for it.

        Returns:
            On the first rank the last `checkpoint`.

        Raises:
            StageStopped: it was told to stop, and can go on.
            StageError: it left no checkpoint.
        """

    def planned(self, dense: str, card: str) -> dict[str, float] | None:
        """Return memory and speed by the planner, to stand beside what was measured; None where it cannot tell.

        Args:
            dense: the parent's address.
            card: name of the cards that it ran on.
        """
        return None


def open_training(trainer: str, text: str) -> Training:
    """Return the training of a plan's text.

    Args:
        trainer: `nemo` or `bridge`.
        text: the recipe, as the trainer's subclass writes it.
    """
    if trainer == "bridge":
        from nemo_upcycle.pipeline.bridge.training import BridgeTraining

        return BridgeTraining.from_text(text)
    from nemo_upcycle.pipeline.nemo_training import NeMoTraining

    return NeMoTraining(text)


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of the highest step that a training left in its stage's folder.

    Raises:
        StageError: there is none.
    """
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise StageError(
            f"checkpoint in {folder}", got="none", expected="a finished checkpoint", fix="run the stage again"
        )
    return checkpoint
