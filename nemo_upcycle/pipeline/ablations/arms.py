"""The recipe of a grid's arm, and how each trainer changes it."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.facts import Evaluations


#: The key that names an arm's recipe -> module and class of such an arm; a trainer is imported when it is asked for.
_ARMS = {
    "factory": ("nemo_upcycle.pipeline.nemo.arms", "NeMoArm"),
    "recipe": ("nemo_upcycle.pipeline.bridge.arms", "BridgeArm"),
}


@dataclass(frozen=True)
class ArmRequest:
    """What a grid says of an arm.

    Args:
        where: place of the arm in the grid, for the text of errors.
        recipe: name of the recipe in the trainer's command.
        fields: fields of the spec that differ from the recipe's.
        settings: overrides, by name.
        parent: the dense parent; without an address: the grid trains it.
        steps: length of its training; None: as recipe and settings say.
        gpus: ranks that it trains on; None: as the recipe says.
    """

    where: str
    recipe: str
    fields: Mapping[str, Any]
    settings: Mapping[str, Any]
    parent: Parent
    steps: int | None = None
    gpus: int | None = None

    def overrides(self, steps: str) -> list[str]:
        """List the overrides as a command line has them.

        Args:
            steps: the trainer's setting of a training's length.
        """
        settings = dict(self.settings) | ({steps: self.steps} if self.steps else {})
        return [f"{name}={value}" for name, value in settings.items()]


class Arm(ABC):
    """An arm of a grid, its recipe built as the command line would, and checked."""

    #: What trains it, as a plan names it.
    trainer: ClassVar[str]

    @abstractmethod
    def __init__(self, request: ArmRequest) -> None: ...

    @abstractmethod
    def cell(self, seed: int, name: str, evaluations: Evaluations, tokens_read: int = 0) -> str:
        """Write the training of one seed: of the router, the method's random numbers and the data's order.

        Args:
            seed: the cell's seed.
            name: the cell's name.
            evaluations: evaluations during training.
            tokens_read: tokens of the training of the same seed that leaves the parent; this one goes on behind them.
        """

    def parent(self) -> str:
        """Write the recipe of a dense model as it is, which trains a grid's parent.

        Raises:
            UpcycleError: the recipe cannot train a parent.
        """
        raise UpcycleError("parent", got=self.trainer, expected="a recipe of NeMo", fix="name a factory")


def open_arm(key: str, request: ArmRequest) -> Arm:
    """Build an arm in the trainer of its recipe.

    Args:
        key: `factory` or `recipe`.
        request: settings of the arm in the grid.

    Raises:
        UpcycleError: a setting is not valid; the text names it.
    """
    module, name = _ARMS[key]
    try:
        kind = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        fix = (
            "run it where that trainer is installed, or name a recipe of the trainer here (see `nemo-upcycle doctor`)"
        )
        raise UpcycleError(
            f"{request.where}: {key} {request.recipe}",
            kind="missing",
            got=f"needs a trainer that is not installed here ({error})",
            fix=fix,
        ) from None
    arm: Arm = kind(request)
    return arm
