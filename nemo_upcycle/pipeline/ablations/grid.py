"""Read a grid of ablations: its arms as recipes, checked before anything is started."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nemo_run as run

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.suite import read_suite_config
from nemo_upcycle.pipeline.ablations.plan import GridPlan
from nemo_upcycle.pipeline.recipes_io import check_recipe, dump_recipe, train_on
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.conf import read_conf
from nemo_upcycle.utils.validation import is_whole


_KEYS = ("about", "dense", "data", "parent", "evaluate", "seeds", "defaults", "arms", "references", "budgets")
_ARM_KEYS = ("about", "factory", "file", "spec", "set", "exact")
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
    _check_keys(str(path), content, _KEYS)
    arms: dict[str, Any] = content.get("arms") or {}
    if not arms:
        raise UpcycleError(f"{path}: arms", got="none", expected="at least one", fix="see conf/ablations/laptop.yaml")
    seeds = content.get("seeds", [1234])
    if not isinstance(seeds, list) or not seeds or not all(is_whole(seed, 0) for seed in seeds):
        raise UpcycleError(
            f"{path}: seeds", got=seeds, expected="a list of whole numbers", fix="write seeds: [1, 2, 3]"
        )
    evaluate = content.get("evaluate") or {}
    _check_keys(f"{path}: evaluate", evaluate, _EVALUATE_KEYS)
    suite = _suite_of(evaluate.get("suite", "watch"), folder)
    defaults = content.get("defaults") or {}
    cells, described = {}, {}
    for arm, values in arms.items():
        where = f"{path}: arms.{arm}"
        if not _NAME.fullmatch(str(arm)):
            raise UpcycleError(where, got=arm, expected="letters, digits and _", fix="rename the arm")
        values = _read_arm(where, values, path.parent)
        for seed in seeds:
            recipe = _recipe(where, values, defaults, seed)
            recipe.trainer.callbacks.append(_watch(suite, evaluate))
            cell = f"{arm}-seed{seed}"
            recipe.log.name = cell
            cells[cell] = dump_recipe(recipe)
            described[cell] = {
                "arm": arm,
                "seed": seed,
                "steps": recipe.trainer.max_steps,
                "tokens_per_step": recipe.data.global_batch_size * recipe.data.seq_length,
            }
    references = _known_arms(f"{path}: references", content.get("references") or {}, arms)
    table = {
        "about": content.get("about", ""),
        "arms": {arm: (values or {}).get("about", "") for arm, values in arms.items()},
        "cells": described,
        "references": references,
        "budgets": content.get("budgets") or {},
    }
    parent, vocabulary = _parent(f"{path}: parent", content.get("parent")) if not dense else (None, None)
    if not parent and not (dense or content.get("dense")):
        raise UpcycleError(
            f"{path}: dense", got="none", expected="a dense parent", fix="add dense=FOLDER, or a parent:"
        )
    return GridPlan(
        path.stem,
        "" if parent else str(dense or content["dense"]),
        data or _from_here(str(content.get("data", "sotu")), folder),
        parent,
        vocabulary,
        cells,
        table,
    )


def _from_here(name: str, folder: Path) -> str:
    """Return the absolute path of a YAML file that a grid names, or the name of one of the package's own."""
    return str((folder / Path(name).expanduser()).absolute()) if name.endswith((".yaml", ".yml")) else name


def _suite_of(name: str, folder: Path) -> str:
    """Return a suite's name or absolute path, checked."""
    suite = _from_here(name, folder)
    if not read_suite_config(suite).local:
        raise UpcycleError(
            f"suite {suite}", got="lm-eval's own tasks", expected="local ones", fix="name another suite"
        )
    return suite


def _read_arm(where: str, values: Any, folder: Path) -> dict[str, Any]:
    """Return an arm's factory, spec and overrides; a file of a single arm gives both."""
    values = dict(values or {})
    _check_keys(where, values, _ARM_KEYS)
    if "file" in values:
        content, _, _ = read_conf("ablations", folder / values["file"], f"{where}: file")
        given = dict(_flat({key: value for key, value in content.items() if key != "run"}))
        values = {**values, "factory": content["run"]["factory"], "set": given | (values.get("set") or {})}
    if not isinstance(values.get("factory"), str):
        raise UpcycleError(
            f"{where}: factory", got=values.get("factory"), expected="a recipe, as --factory takes it", fix="name one"
        )
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _recipe(where: str, arm: Mapping[str, Any], defaults: Mapping[str, Any], seed: int | None) -> run.Partial:
    """Build the recipe of an arm for one seed, as the command line would, and check it.

    The seed changes the router and the method's random numbers, the order of the data, and whatever torch draws.
    """
    from nemo.collections.llm.api import pretrain

    from nemo_upcycle.pipeline.context import PretrainContext
    from nemo_upcycle.recipes.common import use_spec

    overrides = [f"{name}={value}" for name, value in (dict(defaults) | (arm.get("set") or {})).items()]
    context = PretrainContext(name="pretrain", factory=arm["factory"], dryrun=True)
    context.executor = None
    try:
        recipe = context.parse_fn(pretrain, overrides)
        spec = recipe.resume.restore_config.spec
        if arm.get("spec"):
            use_spec(recipe, UpcycleSpec(**(dict(spec.__arguments__) | arm["spec"])))
        if seed is not None:
            train_on(recipe, "data", "parent")  # both take their places when the training starts
            recipe.data.seed = seed
            if recipe.resume.restore_config.spec:
                recipe.resume.restore_config.spec.seed = seed
        check_recipe(recipe)
    except UpcycleError as error:
        raise UpcycleError(f"{where}: {error}") from None
    except TypeError as error:  # a field that the spec does not have
        raise UpcycleError(f"{where}: spec", got=error, expected="fields of UpcycleSpec", fix="correct it") from None
    return recipe


def _watch(suite: str, values: Mapping[str, Any]) -> run.Config:
    from nemo_upcycle.training.evaluating import EvaluateWhileTraining

    return run.Config(EvaluateWhileTraining, **(dict(values) | {"suite": suite}))


def _parent(where: str, values: Any) -> tuple[str | None, int | None]:
    """Return the serialised recipe that trains the parent, and the size of its vocabulary."""
    if not values:
        return None, None
    _check_keys(where, values, _PARENT_KEYS)
    if not is_whole(values.get("vocabulary"), 300):
        raise UpcycleError(
            f"{where}.vocabulary",
            got=values.get("vocabulary"),
            expected="a whole number from 300 on",
            fix="write 2048",
        )
    recipe = _recipe(where, values, {}, None)
    if recipe.resume.restore_config.spec:
        raise UpcycleError(f"{where}.factory", got="an upcycled model", expected="a dense one", fix="name its parent")
    return dump_recipe(recipe), values["vocabulary"]


def _known_arms(where: str, references: Mapping[str, Any], arms: Mapping[str, Any]) -> dict[str, Any]:
    for name in (other for pair in references.items() for other in pair):
        if name not in arms:
            raise UpcycleError.unknown(f"{where}: arm", str(name), arms)
    return dict(references)


def _check_keys(where: str, values: Any, known: tuple[str, ...]) -> None:
    if not isinstance(values, dict):
        raise UpcycleError(where, got=values, expected="keys", fix="see conf/ablations/laptop.yaml")
    for key in values:
        if key not in known:
            raise UpcycleError.unknown(f"{where}: key", str(key), known)
