"""Build the arms of a grid from recipes of NeMo."""

from __future__ import annotations

import copy
from dataclasses import asdict

import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo_run.cli.cli_parser import parse_cli_args

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.ablations.arms import Arm, ArmRequest
from nemo_upcycle.pipeline.context import CheckedContext
from nemo_upcycle.pipeline.parser import parsing
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.facts import Evaluations
from nemo_upcycle.trainers.nemo.checks import check_recipe
from nemo_upcycle.trainers.nemo.evaluating import EvaluateWhileTraining
from nemo_upcycle.trainers.nemo.recipes import (
    PLACED_PARTS,
    dump_recipe,
    ignored_settings,
    placed_settings,
    train_on,
)
from nemo_upcycle.trainers.nemo.upcycled import use_spec
from nemo_upcycle.trainers.settings import setting


class NeMoArm(Arm):
    """An arm that NeMo trains.

    Args:
        request: settings of the arm in the grid; `recipe` is a value of `--factory`.

    Raises:
        UpcycleError: a setting is invalid; the text names it.
    """

    trainer = "nemo"

    def __init__(self, request: ArmRequest) -> None:
        overrides, fields = request.overrides("trainer.max_steps"), request.fields
        context = CheckedContext(name="pretrain", factory=request.recipe, dryrun=True)
        context.executor = None
        try:
            self.recipe = context.parse_fn(pretrain, overrides)
            spec = setting(self.recipe, "resume.restore_config.spec")
            if fields:
                if spec is None:
                    raise UpcycleError(
                        "spec", kind="refused", got="is set, and the recipe trains a dense model", fix="omit spec"
                    )
                use_spec(self.recipe, UpcycleSpec(**(dict(spec.__arguments__) | dict(fields))))
                with parsing():
                    parse_cli_args(self.recipe, overrides)  # overrides win over the spec
            check_recipe(self.recipe)
            placed = placed_settings(self.recipe)
            if any(word.partition("=")[0] in placed for word in overrides):
                usual = context.parse_fn(pretrain, [word for word in overrides if not word.startswith(PLACED_PARTS)])
                if ignored := [*ignored_settings(self.recipe, usual)]:
                    raise UpcycleError.together(ignored)
        except UpcycleError as error:
            raise error.within(request.where) from None
        except TypeError as error:  # the spec has no such field
            raise UpcycleError(
                f"{request.where}: spec",
                kind="state",
                got=f"has fields that UpcycleSpec does not have ({error})",
                fix="correct the names of the fields",
            ) from None

    def cell(self, seed: int, name: str, evaluations: Evaluations, tokens_read: int = 0) -> str:
        """See `Arm.cell`."""
        cell = copy.deepcopy(self.recipe)
        given = {key: value for key, value in asdict(evaluations).items() if value is not None}
        cell.trainer.callbacks.append(run.Config(EvaluateWhileTraining, **given))
        train_on(cell, "data", "parent")  # placeholders, which are replaced when the training starts
        cell.data.seed, cell.log.name = seed, name
        if tokens_read:
            cell.data.skip_samples = tokens_read // cell.data.seq_length
        if cell.resume.restore_config.spec:
            cell.resume.restore_config.spec.seed = seed
        return dump_recipe(cell)

    def parent(self) -> str:
        """See `Arm.parent`."""
        if self.recipe.resume.restore_config.spec:
            raise UpcycleError(
                "The factory of the parent",
                kind="refused",
                got="makes an upcycled model",
                fix="name a factory of a dense model",
            )
        return dump_recipe(self.recipe)
