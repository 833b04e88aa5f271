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


def build_arm(where: str, factory: str, fields: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> run.Partial:
    """Build the recipe of an arm as the command line would, and check it.

    Args:
        where: it stands, for the text of errors.
        factory: of its recipe, as `--factory` takes it.
        fields: of the spec, that differ from the recipe's.
        settings: overrides, by name.

    Raises:
        UpcycleError: it is not valid; the text names it.
    """
    overrides = [f"{name}={value}" for name, value in settings.items()]
    context = CheckedContext(name="pretrain", factory=factory, dryrun=True)
    context.executor = None
    try:
        recipe = context.parse_fn(pretrain, overrides)
        spec = getattr(getattr(recipe.resume, "restore_config", None), "spec", None)
        if fields:
            if spec is None:
                raise UpcycleError("spec", got=dict(fields), expected="none of a dense recipe", fix="leave it out")
            use_spec(recipe, UpcycleSpec(**(dict(spec.__arguments__) | fields)))
            parse_cli_args(recipe, overrides)  # what is set wins
        check_recipe(recipe)
    except UpcycleError as error:
        raise error.within(where) from None
    except TypeError as error:  # a field that the spec does not have
        raise UpcycleError(f"{where}: spec", got=error, expected="fields of UpcycleSpec", fix="correct it") from None
    return recipe


def cell_of(recipe: run.Partial, seed: int, name: str, evaluations: Evaluations) -> str:
    """Return the serialised recipe of an arm and a seed: of the router, the method's random numbers, the data's order.

    Args:
        recipe: of the arm.
        seed: of the cell.
        name: of the cell.
        evaluations: what is scored on the way.
    """
    cell = copy.deepcopy(recipe)
    given = {name: value for name, value in asdict(evaluations).items() if value is not None}
    cell.trainer.callbacks.append(run.Config(EvaluateWhileTraining, **given))
    train_on(cell, "data", "parent")  # both take their places when the training starts
    cell.data.seed, cell.log.name = seed, name
    if cell.resume.restore_config.spec:
        cell.resume.restore_config.spec.seed = seed
    return dump_recipe(cell)
