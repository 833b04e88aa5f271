"""Read a grid of ablations: its arms as recipes, checked before anything is started."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.arms import MARGIN, ROUNDING
from nemo_upcycle.evaluation.heldout import TASK
from nemo_upcycle.pipeline.ablations.stages import SUITE, GridPlan
from nemo_upcycle.pipeline.plan import open_training
from nemo_upcycle.suites.suite_config import read_suite_config
from nemo_upcycle.trainers.base import Evaluations
from nemo_upcycle.utils.conf import as_dataclass, read_conf, template
from nemo_upcycle.utils.nested import flat


_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass
class EvaluateConfig:
    """What is scored on the live models, and how often; as in `Evaluations`."""

    suite: str = "watch"
    every_n_steps: int = 500
    batch_size: int | None = None


@dataclass
class ParentConfig:
    """The recipe that trains the parent, and the size of its tokenizer's vocabulary."""

    factory: str
    vocabulary: int
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class ArmConfig:
    """An arm: its recipe in NeMo (`factory`, or a file that names one) or in Bridge, and what differs."""

    factory: str | None = None
    recipe: str | None = None
    gpus: int | None = None
    file: str | None = None
    about: str | None = None
    spec: dict[str, Any] | None = None
    set: dict[str, Any] | None = None


@dataclass
class BudgetsConfig:
    """Arms that are compared after several numbers of tokens."""

    arms: list[str]
    tokens: list[int]


@dataclass
class GridConfig:
    """A grid; `conf/ablations/laptop.yaml` explains every key."""

    arms: dict[str, ArmConfig]
    about: str | None = None
    dense: str | None = None
    data: str = "sotu"
    parent: ParentConfig | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seeds: list[int] = field(default_factory=lambda: [1234])
    defaults: dict[str, Any] | None = None
    references: dict[str, str] | None = None
    margin: float = MARGIN
    budgets: BudgetsConfig | None = None


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
    grid = as_dataclass(str(path), content, GridConfig, "ablations")
    arms = {name: _with_file(f"{path}: arms.{name}", arm, path.parent) for name, arm in grid.arms.items()}
    _check(str(path), grid)
    suite = _suite_of(f"{path}: evaluate.suite", grid.evaluate.suite, folder)
    every_n_steps = grid.evaluate.every_n_steps
    evaluations = Evaluations(suite=SUITE, every_n_steps=every_n_steps, batch_size=grid.evaluate.batch_size)
    cells, described, trainers = {}, {}, set[str]()
    address = str(dense or grid.dense or "")
    for arm, config in arms.items():
        built = _built(f"{path}: arms.{arm}", config, (grid.defaults or {}) | (config.set or {}), address)
        trainers.add(built.trainer)
        for seed in grid.seeds:
            cell = f"{arm}-seed{seed}"
            cells[cell] = built.cell(seed, cell, evaluations)
            facts = open_training(built.trainer, cells[cell]).facts(address)
            assert facts is not None  # an arm of Bridge's is built with its parent
            described[cell] = {
                "arm": arm,
                "seed": seed,
                "steps": facts.steps,
                "tokens_per_step": facts.step_tokens,
                "schedule": facts.schedule,
                "is_rate_constant": facts.is_rate_constant,
            }
    if len(trainers) > 1:
        got, expected = "recipes of NeMo and of Megatron-Bridge", "those of one"
        raise UpcycleError(f"{path}: arms", got=got, expected=expected, fix="make two grids")
    table = {
        "about": grid.about or "",
        "arms": {arm: config.about or "" for arm, config in arms.items()},
        "cells": described,
        "references": _references(f"{path}: references", grid.references or {}, arms),
        "margin": grid.margin,
        "budgets": _budgets(f"{path}: budgets", grid.budgets, described, every_n_steps),
    }
    parent, vocabulary = _parent(f"{path}: parent", grid.parent) if not dense else (None, None)
    if not parent and not address:
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
        "" if parent else address,
        data or _from_here(grid.data, folder),
        parent,
        vocabulary,
        suite,
        cells,
        table,
        trainers.pop(),
    )


def _check(path: str, grid: GridConfig) -> None:
    """Check the numbers of a grid, and the names of its arms."""
    for name in grid.arms:
        if not _NAME.fullmatch(name):
            raise UpcycleError(
                f"{path}: arms.{name}", got=name, expected="letters, digits and _", fix="rename the arm"
            )
    if not grid.arms:
        raise UpcycleError(f"{path}: arms", got="none", expected="at least one", fix=f"see {template('ablations')}")
    if not grid.seeds or min(grid.seeds) < 0:
        got, expected = grid.seeds, "whole numbers from 0 on"
        raise UpcycleError(f"{path}: seeds", got=got, expected=expected, fix="write seeds: [1, 2, 3]")
    if not 2 * ROUNDING <= grid.margin < math.inf:
        expected = f"bits per byte, from {2 * ROUNDING:g} on: less is rounding"
        raise UpcycleError(f"{path}: margin", got=grid.margin, expected=expected, fix=f"write margin: {MARGIN:g}")
    evaluate, vocabulary = grid.evaluate, grid.parent.vocabulary if grid.parent else None
    lows = {
        "evaluate.every_n_steps": (evaluate.every_n_steps, 1),
        "evaluate.batch_size": (evaluate.batch_size, 1),
        "parent.vocabulary": (vocabulary, 300),
    }
    for key, (value, low) in lows.items():
        if value is not None and value < low:
            expected = f"a whole number from {low} on"
            raise UpcycleError(f"{path}: {key}", got=value, expected=expected, fix=f"write {max(low, 2048)}")


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


def _with_file(where: str, arm: ArmConfig, folder: Path) -> ArmConfig:
    """Return an arm with its recipe, and with what a file of a single arm says."""
    if arm.file:
        content, *_ = read_conf("ablations", folder / arm.file, f"{where}: file")
        run = content.pop("run", None)
        factory = run.get("factory") if isinstance(run, dict) else None
        arm = replace(arm, factory=factory, set=dict(flat(content, ".")) | (arm.set or {}))
    if (arm.factory is None) == (arm.recipe is None):
        expected = "a recipe: `factory`, as --factory takes it, or `recipe`, one by Megatron-Bridge's naming"
        got = "both" if arm.factory else "none"
        raise UpcycleError(f"{where}: factory", got=got, expected=expected, fix="name one")
    return arm


def _built(where: str, arm: ArmConfig, settings: dict[str, Any], dense: str) -> Any:
    """Return an arm with its recipe, in its trainer."""
    if arm.recipe is None:
        from nemo_upcycle.pipeline.nemo.arms import NeMoArm

        return NeMoArm(where, str(arm.factory), arm.spec or {}, settings)
    from nemo_upcycle.pipeline.bridge.arms import BridgeArm

    if not dense:
        fix = "add dense=FOLDER, or dense: to the grid"
        raise UpcycleError(f"{where}: recipe", got="no dense parent", expected="one that is there", fix=fix)
    return BridgeArm(where, arm.recipe, arm.spec or {}, settings, arm.gpus, dense)


def _parent(where: str, parent: ParentConfig | None) -> tuple[str | None, int | None]:
    """Return the serialised recipe that trains the parent, and the size of its vocabulary."""
    if parent is None:
        return None, None
    from nemo_upcycle.pipeline.nemo.arms import NeMoArm

    return NeMoArm(where, parent.factory, {}, parent.set).parent(), parent.vocabulary


def _references(where: str, references: dict[str, str], arms: Mapping[str, Any]) -> dict[str, str]:
    for name in (name for pair in references.items() for name in pair):
        if name not in arms:
            raise UpcycleError.unknown(f"{where}: arm", name, arms)
    return references


def _budgets(
    where: str, budgets: BudgetsConfig | None, cells: Mapping[str, Mapping[str, Any]], every_n_steps: int
) -> dict[str, Any]:
    """Return arms and tokens of the budgets; every one of these arms must be scored after each of them."""
    if budgets is None:
        return {}
    found = asdict(budgets)
    for key, value in found.items():
        if len(value) < 2:
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
