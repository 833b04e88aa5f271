"""The arms of a grid as recipes of NeMo."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo_run.cli.cli_parser import parse_cli_args

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.context import CheckedContext
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.base import Evaluations
from nemo_upcycle.trainers.nemo.checks import check_recipe
from nemo_upcycle.trainers.nemo.evaluating import EvaluateWhileTraining
from nemo_upcycle.trainers.nemo.recipes import dump_recipe, train_on
from nemo_upcycle.trainers.nemo.upcycled import use_spec
from nemo_upcycle.trainers.settings import setting


class NeMoArm:
    """An arm of a grid in NeMo, its recipe built as the command line would, and checked.

    Args:
        where: it stands, for the text of errors.
        factory: of its recipe, as `--factory` takes it.
        fields: of the spec, that differ from the recipe's.
        settings: overrides, by name.

    Raises:
        UpcycleError: it is not valid; the text names it.
    """

    trainer = "nemo"
    #: The setting of a training's length.
    steps = "trainer.max_steps"

    def __init__(self, where: str, factory: str, fields: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        overrides = [f"{name}={value}" for name, value in settings.items()]
        context = CheckedContext(name="pretrain", factory=factory, dryrun=True)
        context.executor = None
        try:
            self.recipe = context.parse_fn(pretrain, overrides)
            spec = setting(self.recipe, "resume.restore_config.spec")
            if fields:
                if spec is None:
                    raise UpcycleError("spec", got=dict(fields), expected="none of a dense recipe", fix="omit it")
                use_spec(self.recipe, UpcycleSpec(**(dict(spec.__arguments__) | dict(fields))))
                parse_cli_args(self.recipe, overrides)  # what is set wins
            check_recipe(self.recipe)
        except UpcycleError as error:
            raise error.within(where) from None
        except TypeError as error:  # a field that the spec does not have
            expected = "fields of UpcycleSpec"
            raise UpcycleError(f"{where}: spec", got=error, expected=expected, fix="correct it") from None

    def cell(self, seed: int, name: str, evaluations: Evaluations, tokens_read: int = 0) -> str:
        """Return the recipe of one seed: of the router, the method's random numbers and the data's order.

        Args:
            seed: of the cell.
            name: of the cell.
            evaluations: what is scored on the way.
            tokens_read: by the training of the same seed that leaves the parent; this one goes on behind them.
        """
        cell = copy.deepcopy(self.recipe)
        given = {key: value for key, value in asdict(evaluations).items() if value is not None}
        cell.trainer.callbacks.append(run.Config(EvaluateWhileTraining, **given))
        train_on(cell, "data", "parent")  # both take their places when the training starts
        cell.data.seed, cell.log.name = seed, name
        if tokens_read:
            cell.data.skip_samples = tokens_read // cell.data.seq_length
        if cell.resume.restore_config.spec:
            cell.resume.restore_config.spec.seed = seed
        return dump_recipe(cell)

    def parent(self) -> str:
        """Return the recipe of a dense model as it is, which trains a grid's parent.

        Raises:
            UpcycleError: it upcycles.
        """
        if self.recipe.resume.restore_config.spec:
            raise UpcycleError("factory", got="an upcycled model", expected="a dense one", fix="name its parent")
        return dump_recipe(self.recipe)
