"""Build the recipes of a grid's arms. Each trainer has its own subclass of `Arm`."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.facts import Evaluations


#: Module and class of each kind of arm, by the key that names the arm's recipe in a grid. A trainer is imported only
#: when it is needed.
_ARMS = {
    "factory": ("nemo_upcycle.pipeline.nemo.arms", "NeMoArm"),
    "recipe": ("nemo_upcycle.pipeline.bridge.arms", "BridgeArm"),
}


@dataclass(frozen=True)
class ArmRequest:
    """Settings of one arm, as the grid gives them.

    Args:
        where: place of the arm in the grid, for error messages.
        recipe: name of the recipe in the trainer's command.
        fields: fields of the spec whose values differ from the recipe's values.
        settings: overrides, by name.
        parent: dense parent; the parent's address is empty if the grid trains the parent.
        steps: training steps; if None, the recipe and the settings decide.
        gpus: ranks that train the arm; if None, the recipe decides.
    """

    where: str
    recipe: str
    fields: Mapping[str, Any]
    settings: Mapping[str, Any]
    parent: Parent
    steps: int | None = None
    gpus: int | None = None

    def overrides(self, steps: str) -> list[str]:
        """List the overrides in the form of the command line.

        Args:
            steps: name of the trainer's setting for the number of steps.
        """
        settings = dict(self.settings) | ({steps: self.steps} if self.steps else {})
        return [f"{name}={value}" for name, value in settings.items()]


class Arm(ABC):
    """One arm of a grid. The arm's recipe is built and checked like a recipe on the command line."""

    #: Name of the trainer, as in a plan.
    trainer: ClassVar[str]

    @abstractmethod
    def __init__(self, request: ArmRequest) -> None: ...

    @abstractmethod
    def cell(self, seed: int, name: str, evaluations: Evaluations, tokens_read: int = 0) -> str:
        """Serialise the training of a seed. The seed sets the router, the method's random numbers and the data order.

        Args:
            seed: seed of the cell.
            name: name of the cell.
            evaluations: evaluations during training.
            tokens_read: tokens that the training of the cell's parent has read with the same seed; the cell's training
                continues after these tokens.
        """

    def parent(self) -> str:
        """Serialise the unchanged recipe of the dense model that is the grid's parent.

        Raises:
            UpcycleError: the recipe cannot train a parent.
        """
        raise UpcycleError(
            "parent", got=self.trainer, expected="a recipe of NeMo", fix="set parent to a factory of NeMo"
        )


def open_arm(key: str, request: ArmRequest) -> Arm:
    """Build an arm with the trainer of its recipe.

    Args:
        key: `factory` or `recipe`.
        request: settings of the arm in the grid.

    Raises:
        UpcycleError: a setting is invalid; the text names it.
    """
    module, name = _ARMS[key]
    try:
        kind = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        fix = (
            "run the grid where that trainer is installed, or name a recipe of the trainer that is installed here "
            "(see `nemo-upcycle doctor`)"
        )
        raise UpcycleError(
            f"{request.where}: {key} {request.recipe}",
            kind="missing",
            got=f"needs a trainer that is not installed here ({error})",
            fix=fix,
        ) from None
    arm: Arm = kind(request)
    return arm
