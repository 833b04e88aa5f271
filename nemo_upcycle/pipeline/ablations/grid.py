"""Read a grid of ablations: its arms as recipes, checked before anything is started."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.cli.cli_parser import parse_cli_args

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.arms import MARGIN, ROUNDING
from nemo_upcycle.evaluation.heldout import TASK
from nemo_upcycle.evaluation.suite_config import read_suite_config
from nemo_upcycle.pipeline.ablations.plan import SUITE, GridPlan
from nemo_upcycle.pipeline.recipes_io import check_recipe, dump_recipe, train_on
from nemo_upcycle.pipeline.upcycled import use_spec
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.conf import read_conf, template
from nemo_upcycle.utils.nested import flat
from nemo_upcycle.utils.validation import is_whole


_KEYS = (
    "about",
    "dense",
    "data",
    "parent",
    "evaluate",
    "seeds",
    "defaults",
    "arms",
    "references",
    "margin",
    "budgets",
)
_ARM_KEYS = ("about", "factory", "file", "spec", "set")
_PARENT_KEYS = ("factory", "set", "vocabulary")
_EVALUATE_KEYS = ("suite", "every_n_steps", "batch_size")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


def read_grid(name: str | Path, dense: str | None = None, data: str | None = None) -> GridPlan:
    """Read a grid, and build and check the recipe of every arm and seed.

    Args:
        name: of `conf/ablations`, or the path of a YAML file like those.
        dense: another dense parent than the grid's.
        data: another blend, or a finished folder.

    Raises:
        UpcycleError: a key, arm, recipe or override is not valid; the text names the arm.
    """
    content, path, folder = read_conf("ablations", name, "grid")
    content = _mapping(str(path), content, _KEYS)
    arms = {
        name: _read_arm(f"{path}: arms.{name}", values, path.parent)
        for name, values in _mapping(f"{path}: arms", content.get("arms")).items()
    }
    if not arms:
        raise UpcycleError(f"{path}: arms", got="none", expected="at least one", fix=f"see {template('ablations')}")
    seeds = _seeds(f"{path}: seeds", content.get("seeds", [1234]))
    watch = _mapping(f"{path}: evaluate", content.get("evaluate"), _EVALUATE_KEYS)
    suite = _suite_of(f"{path}: evaluate.suite", str(watch.pop("suite", "watch")), folder)
    callback = _watch(f"{path}: evaluate", watch)
    defaults = _mapping(f"{path}: defaults", content.get("defaults"))
    cells, described = {}, {}
    for arm, values in arms.items():
        recipe = _recipe(f"{path}: arms.{arm}", values, defaults)
        recipe.trainer.callbacks.append(callback)
        for seed in seeds:
            cell = f"{arm}-seed{seed}"
            cells[cell] = dump_recipe(_seeded(recipe, seed, cell))
            described[cell] = {
                "arm": arm,
                "seed": seed,
                "steps": recipe.trainer.max_steps,
                "tokens_per_step": recipe.data.global_batch_size * recipe.data.seq_length,
                "schedule": _schedule(recipe.optim),
                "is_rate_constant": _is_rate_constant(recipe.optim),
            }
    table = {
        "about": content.get("about", ""),
        "arms": {arm: str(values.get("about") or "") for arm, values in arms.items()},
        "cells": described,
        "references": _references(f"{path}: references", content.get("references"), arms),
        "margin": _margin(f"{path}: margin", content.get("margin", MARGIN)),
        "budgets": _budgets(f"{path}: budgets", content.get("budgets"), described, callback.every_n_steps),
    }
    parent, vocabulary = _parent(f"{path}: parent", content.get("parent")) if not dense else (None, None)
    if not parent and not (dense or content.get("dense")):
        raise UpcycleError(
            f"{path}: dense", got="none", expected="a dense parent", fix="add dense=FOLDER, or a parent:"
        )
    if parent and data and Path(data).is_dir():
        raise UpcycleError(
            f"data {data}",
            got="a finished folder",
            expected="a blend: the grid trains its parent, and a tokenizer for it",
            fix="give the dense model of the folder's tokenizer as well (dense=FOLDER)",
        )
    return GridPlan(
        path.stem,
        "" if parent else str(dense or content["dense"]),
        data or _from_here(str(content.get("data", "sotu")), folder),
        parent,
        vocabulary,
        suite,
        cells,
        table,
    )


def _schedule(optim: Any) -> str:
    """Return what tells schedules of the learning rate apart."""
    scheduler = getattr(optim, "lr_scheduler", None)
    settings = "constant"
    if scheduler is not None:
        given = ", ".join(f"{name}={value}" for name, value in sorted(scheduler.__arguments__.items()))
        settings = f"{scheduler.__fn_or_cls__.__name__}({given})"
    return f"lr={optim.config.lr}, {settings}"


def _is_rate_constant(optim: Any) -> bool:
    scheduler = getattr(optim, "lr_scheduler", None)
    return scheduler is None or getattr(scheduler, "min_lr", None) == optim.config.lr


def _margin(where: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 2 * ROUNDING <= value < math.inf:
        raise UpcycleError(
            where,
            got=value,
            expected=f"bits per byte, from {2 * ROUNDING:g} on: less is rounding",
            fix=f"write margin: {MARGIN:g}",
        )
    return float(value)


def _from_here(name: str, folder: Path) -> str:
    """Return the absolute path of a YAML file that a grid names, or the name of one of the package's own."""
    return str((folder / Path(name).expanduser()).absolute()) if name.endswith((".yaml", ".yml")) else name


def _suite_of(where: str, name: str, folder: Path) -> str:
    """Return a suite's name or absolute path, checked."""
    suite = _from_here(name, folder)
    config = read_suite_config(suite)
    if not config.local or TASK not in config.tasks:
        raise UpcycleError(
            where, got=suite, expected=f"a local suite with {TASK}", fix="name laptop, watch or your own"
        )
    return suite


def _seeds(where: str, values: Any) -> list[int]:
    if not isinstance(values, list) or not values or not all(is_whole(seed, 0) for seed in values):
        raise UpcycleError(where, got=values, expected="a list of whole numbers", fix="write seeds: [1, 2, 3]")
    return values


def _read_arm(where: str, values: Any, folder: Path) -> dict[str, Any]:
    """Return an arm's factory, spec and overrides; a file of a single arm gives both."""
    if not _NAME.fullmatch(name := where.rpartition(".")[2]):
        raise UpcycleError(where, got=name, expected="letters, digits and _", fix="rename the arm")
    values = _mapping(where, values, _ARM_KEYS)
    values |= {key: _mapping(f"{where}: {key}", values.get(key)) for key in ("spec", "set")}
    if "file" in values:
        content, path, _ = read_conf("ablations", folder / str(values["file"]), f"{where}: file")
        factory = _mapping(f"{path}: run", content.pop("run", None)).get("factory")
        values |= {"factory": factory, "set": dict(flat(content, ".")) | values["set"]}
    if not isinstance(values.get("factory"), str):
        raise UpcycleError(
            f"{where}: factory", got=values.get("factory"), expected="a recipe, as --factory takes it", fix="name one"
        )
    return values


def _recipe(where: str, arm: Mapping[str, Any], defaults: Mapping[str, Any]) -> run.Partial:
    """Build the recipe of an arm as the command line would, and check it."""
    from nemo.collections.llm.api import pretrain

    from nemo_upcycle.pipeline.context import CheckedContext

    overrides = [f"{name}={value}" for name, value in (dict(defaults) | arm["set"]).items()]
    context = CheckedContext(name="pretrain", factory=arm["factory"], dryrun=True)
    context.executor = None
    try:
        recipe = context.parse_fn(pretrain, overrides)
        spec = getattr(getattr(recipe.resume, "restore_config", None), "spec", None)
        if arm["spec"]:
            if spec is None:
                raise UpcycleError("spec", got=arm["spec"], expected="none of a dense recipe", fix="leave it out")
            use_spec(recipe, UpcycleSpec(**(dict(spec.__arguments__) | arm["spec"])))
            parse_cli_args(recipe, overrides)  # what is set has the last word
        check_recipe(recipe)
    except UpcycleError as error:
        raise error.within(where) from None
    except TypeError as error:  # a field that the spec does not have
        raise UpcycleError(f"{where}: spec", got=error, expected="fields of UpcycleSpec", fix="correct it") from None
    return recipe


def _seeded(recipe: run.Partial, seed: int, name: str) -> run.Partial:
    """Return an arm's recipe for one seed: of the router, of the method's random numbers, of the order of the data."""
    mine = copy.deepcopy(recipe)
    train_on(mine, "data", "parent")  # both take their places when the training starts
    mine.data.seed, mine.log.name = seed, name
    if mine.resume.restore_config.spec:
        mine.resume.restore_config.spec.seed = seed
    return mine


def _watch(where: str, values: Mapping[str, Any]) -> run.Config:
    from nemo_upcycle.training.evaluating import EvaluateWhileTraining

    for key, value in values.items():
        if not is_whole(value, 1):
            raise UpcycleError(f"{where}.{key}", got=value, expected="a whole number from 1 on", fix="write one")
    return run.Config(EvaluateWhileTraining, suite=SUITE, **values)


def _parent(where: str, values: Any) -> tuple[str | None, int | None]:
    """Return the serialised recipe that trains the parent, and the size of its vocabulary."""
    if not values:
        return None, None
    values = _mapping(where, values, _PARENT_KEYS)
    values |= {"spec": {}, "set": _mapping(f"{where}: set", values.get("set"))}
    if not is_whole(values.get("vocabulary"), 300):
        raise UpcycleError(
            f"{where}.vocabulary",
            got=values.get("vocabulary"),
            expected="a whole number from 300 on",
            fix="write 2048",
        )
    recipe = _recipe(where, values, {})
    if recipe.resume.restore_config.spec:
        raise UpcycleError(f"{where}.factory", got="an upcycled model", expected="a dense one", fix="name its parent")
    return dump_recipe(recipe), values["vocabulary"]


def _references(where: str, values: Any, arms: Mapping[str, Any]) -> dict[str, str]:
    found = {name: str(other) for name, other in _mapping(where, values).items()}
    for name in (name for pair in found.items() for name in pair):
        if name not in arms:
            raise UpcycleError.unknown(f"{where}: arm", name, arms)
    return found


def _budgets(where: str, values: Any, cells: Mapping[str, Mapping[str, Any]], every_n_steps: int) -> dict[str, Any]:
    """Return arms and tokens of the budgets; every one of these arms must be scored after each of them."""
    found = _mapping(where, values, ("arms", "tokens"))
    if not found:
        return {}
    for key in ("arms", "tokens"):
        value = found.get(key)
        if not isinstance(value, list) or len(value) < 2:
            raise UpcycleError(f"{where}.{key}", got=value, expected="a list of two or more", fix="see laptop.yaml")
    arms = {cell["arm"]: cell for cell in cells.values()}
    for name in found["arms"]:
        if name not in arms:
            raise UpcycleError.unknown(f"{where}.arms: arm", str(name), arms)
        step_tokens, steps = arms[name]["tokens_per_step"], arms[name]["steps"]
        scored = {step * step_tokens for step in (*range(every_n_steps, steps + 1, every_n_steps), steps)}
        if other := [tokens for tokens in found["tokens"] if tokens not in scored]:
            raise UpcycleError(
                f"{where}.tokens of {name}",
                got=other,
                expected=f"tokens after which it is scored: {', '.join(map(str, sorted(scored)))}",
                fix="take some of these, or change evaluate.every_n_steps",
            )
    return found


def _mapping(where: str, values: Any, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return the keys of a part of the grid; those that are left blank have none."""
    if not isinstance(values or {}, dict):
        raise UpcycleError(where, got=values, expected="keys", fix=f"see {template('ablations')}")
    found = {str(key): value for key, value in (values or {}).items()}
    for key in found if known else ():
        if key not in (known or ()):
            raise UpcycleError.unknown(f"{where}: key", key, known or ())
    return found
