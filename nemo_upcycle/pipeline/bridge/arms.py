"""Build the arms of a grid from recipes of Megatron-Bridge."""

from __future__ import annotations

import json
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.ablations.arms import Arm, ArmRequest
from nemo_upcycle.pipeline.bridge.pipeline import training_of
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.bridge.training import BridgeTraining, required_parent
from nemo_upcycle.trainers.facts import Evaluations


class BridgeArm(Arm):
    """An arm that Megatron-Bridge trains.

    Args:
        request: settings of the arm in the grid; `recipe` is a value of `nemo upcycle pipeline recipe=`.

    Raises:
        UpcycleError: a setting is invalid; the text names it.
    """

    trainer = "bridge"

    def __init__(self, request: ArmRequest) -> None:
        self._request, where, parent = request, request.where, request.parent
        if wrong := sorted({*request.fields} - {one.name for one in fields_of(UpcycleSpec)}):
            raise UpcycleError(
                f"{where}: spec", got=wrong[0], expected="a field of UpcycleSpec", fix="correct the field's name"
            )
        if not parent.address:
            fix = "add dense=FOLDER, or dense: to the grid"
            raise UpcycleError(f"{where}: recipe", kind="missing", got="has no dense parent", fix=fix)
        try:
            training = self._training({}, {})
            self._is_upcycled = training.config(required_parent(parent)).spec is not None
            training.check_parent("pretrain" if self._is_upcycled else "dense_ct", parent, remote=False)
        except UpcycleError as error:
            raise error.within(where) from None

    def _training(self, settings: dict[str, Any], fields: dict[str, Any]) -> BridgeTraining:
        request = replace(self._request, settings={**self._request.settings, **settings})
        training = training_of(request.recipe, request.overrides("train.train_iters"), request.gpus)
        return replace(training, changes=json.dumps(dict(self._request.fields) | fields))

    def cell(self, seed: int, name: str, evaluations: Evaluations, tokens_read: int = 0) -> str:
        """See `Arm.cell`. A grid in Bridge trains no parent, so `tokens_read` is 0."""
        training = self._training({"dataset.seed": seed}, {"seed": seed} if self._is_upcycled else {})
        return replace(training, evaluations=evaluations).to_text()
