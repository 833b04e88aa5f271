"""The arms of a grid as recipes by Megatron-Bridge's naming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.bridge.pipeline import training_of
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.base import Evaluations
from nemo_upcycle.trainers.bridge.config import required_hook
from nemo_upcycle.trainers.bridge.training import BridgeTraining, required_parent


class BridgeArm:
    """An arm of a grid in Megatron-Bridge, checked.

    Args:
        where: it stands, for the text of errors.
        recipe: its name, as `nemo upcycle pipeline recipe=` takes it.
        fields: of the spec, that differ from the recipe's.
        settings: overrides, by name.
        gpus: ranks that it trains on; None: as the recipe's name says.
        dense: address of the dense parent.

    Raises:
        UpcycleError: it is not valid; the text names it.
    """

    trainer = "bridge"
    #: The setting of a training's length.
    steps = "train.train_iters"

    def __init__(
        self,
        where: str,
        recipe: str,
        fields: Mapping[str, Any],
        settings: Mapping[str, Any],
        gpus: int | None,
        dense: str,
    ) -> None:
        self._recipe, self._gpus, self._dense = recipe, gpus, dense
        self._fields, self._settings = dict(fields), dict(settings)
        if wrong := sorted({*fields} - {one.name for one in fields_of(UpcycleSpec)}):
            raise UpcycleError(f"{where}: spec", got=wrong[0], expected="fields of UpcycleSpec", fix="correct it")
        try:
            self._folder = required_parent(dense)
            training = self._training({}, {})
            self._is_upcycled = required_hook(training.config(self._folder)).spec is not None
            training.check_parent("pretrain" if self._is_upcycled else "dense_ct", dense, remote=False)
        except UpcycleError as error:
            raise error.within(where) from None

    def _training(self, settings: dict[str, Any], fields: dict[str, Any]) -> BridgeTraining:
        overrides = [f"{name}={value}" for name, value in (self._settings | settings).items()]
        training = training_of(self._recipe, overrides, self._gpus)
        return replace(training, changes=json.dumps(self._fields | fields))

    def cell(self, seed: int, name: str, evaluations: Evaluations, tokens_read: int = 0) -> str:
        """Return the training of one seed: of the router, the method's random numbers and the data's order.

        Args:
            seed: of the cell.
            name: of the cell.
            evaluations: what is scored on the way.
            tokens_read: 0; a grid in Bridge trains no parent.
        """
        training = self._training({"dataset.seed": seed}, {"seed": seed} if self._is_upcycled else {})
        return replace(training, evaluations=evaluations).to_text()
