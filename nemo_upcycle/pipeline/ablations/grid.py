"""Read a grid of ablations, and check the recipes of its arms before anything starts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import DEMO
from nemo_upcycle.data.suites.suite_config import read_suite_config
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.heldout import TASK
from nemo_upcycle.evaluation.statistics import MARGIN, ROUNDING
from nemo_upcycle.pipeline.ablations.arms import Arm, ArmRequest, open_arm
from nemo_upcycle.pipeline.ablations.stages import SUITE, UNTRAINED, GridPlan
from nemo_upcycle.pipeline.checks import check_demo_data
from nemo_upcycle.pipeline.plan import open_training
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.facts import Evaluations
from nemo_upcycle.utils.conf import as_dataclass, read_conf, template
from nemo_upcycle.utils.nested import flat


_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass
class EvaluateConfig:
    """The suite that scores the models during training, and the steps between two scorings; see `Evaluations`."""

    suite: str = "watch"
    every_n_steps: int = 500
    batch_size: int | None = None


@dataclass
class ParentConfig:
    """The recipe that trains the parent, and the vocabulary size of the parent's tokenizer."""

    factory: str
    vocabulary: int
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class ArmConfig:
    """One arm: its recipe in NeMo (`factory`, or a file that names a factory) or in Bridge, and its own settings.

    `parent` is UNTRAINED, or the dense training of an earlier arm with the same seed: ARM or ARM-STEPS. If it is None,
    the arm starts from the grid's parent. Each number in `lengths` is the number of steps of a separate training.
    `seeds` replace the grid's seeds.
    """

    factory: str | None = None
    recipe: str | None = None
    gpus: int | None = None
    file: str | None = None
    about: str = ""
    spec: dict[str, Any] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None
    lengths: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


@dataclass
class GridConfig:
    """A grid. `laptop.yaml` and `budget.yaml` of `conf/ablations` explain every key."""

    arms: dict[str, ArmConfig]
    about: str = ""
    dense: str = ""
    data: str | None = None
    parent: ParentConfig | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seeds: list[int] = field(default_factory=lambda: [1234])
    defaults: dict[str, Any] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    margin: float = MARGIN


def read_grid(name: str | Path, dense: str | None = None, data: str | None = None) -> GridPlan:
    """Read a grid. Build and check the recipe of every arm and seed.

    Args:
        name: a name in `conf/ablations`, or the path of a YAML file of the same form.
        dense: dense parent, in place of the grid's parent.
        data: blend or finished folder that replaces the grid's data.

    Raises:
        UpcycleError: a key, arm, recipe or override is invalid; the text names the arm.
    """
    content, path, folder = read_conf("ablations", name, "grid")
    grid = as_dataclass(str(path), content, GridConfig, "ablations")
    arms = {name: _with_file(f"{path}: arms.{name}", arm, path.parent) for name, arm in grid.arms.items()}
    _check(str(path), grid)
    if any(arm.parent for arm in arms.values()) and (dense or not grid.parent):
        fix = "omit dense=" if dense else "add parent:, as laptop.yaml has it"
        expected = "parent describes the model that the grid trains from scratch"
        raise UpcycleError(
            f"{path}: parent",
            kind="refused",
            got="cannot be combined with dense=" if dense else "is missing",
            expected=expected,
            fix=fix,
        )
    suite = _from_here(grid.evaluate.suite, folder)
    config = read_suite_config(suite)
    if not config.local or TASK not in config.tasks:
        expected, fix = f"a local suite with {TASK}", "name laptop, watch or a suite of your own"
        raise UpcycleError(f"{path}: evaluate.suite", got=suite, expected=expected, fix=fix)
    scored = grid.evaluate
    evaluations = Evaluations(suite=SUITE, every_n_steps=scored.every_n_steps, batch_size=scored.batch_size)
    dense_parent = Parent(str(dense or grid.dense))
    built = _trainings(str(path), arms, grid, dense_parent, evaluations)
    cells, parents, trainers = dict[str, str](), dict[str, str](), {one.trainer for _, one in built.values()}
    described: dict[str, dict[str, Any]] = {}
    for seed in dict.fromkeys((*grid.seeds, *(seed for arm in arms.values() for seed in arm.seeds))):
        for training, (name, one) in built.items():
            arm, cell = arms[name], f"{training}-seed{seed}"
            if seed not in (arm.seeds or grid.seeds):
                continue
            start: dict[str, Any] | None = None
            if arm.parent:
                parents[cell] = arm.parent if arm.parent == UNTRAINED else f"{arm.parent}-seed{seed}"
                start = described.get(parents[cell])
                if arm.parent != UNTRAINED and (start or {}).get("experts") != 1:
                    dense_ones = (
                        other.rsplit("-seed", 1) for other in described if described[other].get("experts") == 1
                    )
                    names = [UNTRAINED, *(other for other, own in dense_ones if own == str(seed))]
                    raise UpcycleError.unknown(f"{path}: arms.{name}.parent of seed {seed}", arm.parent, names)
            read = start["parent_tokens"] + start["steps"] * start["tokens_per_step"] if start else 0
            cells[cell] = one.cell(seed, cell, evaluations, read)
            facts = open_training(one.trainer, cells[cell]).facts(dense_parent)
            assert facts is not None  # an arm of Bridge has its parent from the start, so the arm's facts are known
            described[cell] = {
                "arm": name,
                "seed": seed,
                "steps": facts.steps,
                "tokens_per_step": facts.step_tokens,
                "schedule": facts.rate.schedule,
                "is_rate_constant": facts.rate.is_constant,
            }
            if arm.parent:
                described[cell] |= {
                    "is_length": bool(arm.lengths),
                    "experts": facts.arch.num_experts or 1,
                    "parent_tokens": read,
                }
    short_first = sorted(cells, key=lambda name: _place(described[name]))
    if len(trainers) > 1:
        raise UpcycleError(
            f"Grid {path}", kind="refused", got="has recipes of both NeMo and Megatron-Bridge", fix="make two grids"
        )
    table = {
        "about": grid.about,
        "arms": {name: arm.about for name, arm in arms.items()},
        "cells": described,
        "references": grid.references,
        "margin": grid.margin,
    }
    parent: str | None = None
    if grid.parent and not dense:
        request = ArmRequest(f"{path}: parent", grid.parent.factory, {}, grid.parent.set, dense_parent)
        parent = open_arm("factory", request).parent()
    if not parent and not dense_parent.address:
        fix = "add dense=FOLDER, or a parent:"
        raise UpcycleError(f"Grid {path}", kind="missing", got="has no dense parent", fix=fix)
    if parent and data and Path(data).is_dir():
        fix = "name a blend, or add the dense model that has the folder's tokenizer (dense=FOLDER)"
        raise UpcycleError(
            f"data {data}",
            kind="refused",
            got="is a finished folder",
            expected="the grid trains its own parent and tokenizer, and needs a blend",
            fix=fix,
        )
    plan = GridPlan(
        path.stem,
        "" if parent else dense_parent.address,
        data or _from_here(grid.data or DEMO, folder),
        parent,
        grid.parent.vocabulary if grid.parent and parent else None,
        suite,
        {name: cells[name] for name in short_first},
        table,
        trainers.pop(),
        parents,
    )
    if plan.inputs.reads_chat:
        raise UpcycleError(
            f"Data {plan.data}",
            kind="refused",
            got="are conversations, and a grid trains on texts",
            fix="name a blend, or a folder of nemo-upcycle data",
        )
    if not (data or grid.data):
        check_demo_data(plan)
    return plan


def _trainings(
    path: str, arms: Mapping[str, ArmConfig], grid: GridConfig, parent: Parent, evaluations: Evaluations
) -> dict[str, tuple[str, Arm]]:
    """Build the trainings of one seed. Return the arm's name and the built `Arm`, by the training's name.

    Raises:
        UpcycleError: recipes cannot be built; the text lists the mistakes of every recipe.
    """
    built, wrong = dict[str, tuple[str, Arm]](), list[UpcycleError]()
    for name, arm in arms.items():
        settings = grid.defaults | arm.set
        lengths: list[int | None] = [*arm.lengths] or [None]
        for steps in lengths:
            training = name if steps is None else f"{name}-{steps}"
            key, recipe = ("recipe", arm.recipe) if arm.recipe else ("factory", str(arm.factory))
            request = ArmRequest(f"{path}: arms.{name}", recipe, arm.spec, settings, parent, steps, arm.gpus)
            try:
                built[training] = name, open_arm(key, request)
            except UpcycleError as error:
                wrong.append(error)
    if wrong:  # also list the mistakes of the arms that were built
        for name, one in dict(built.values()).items():
            tried = open_training(one.trainer, one.cell(0, name, evaluations))
            wrong += tried.problems(f"{path}: arms.{name}", parent)
        raise UpcycleError.together(wrong)
    return built


def _place(cell: Mapping[str, Any]) -> tuple[int, int]:
    """Return the sort key of a training: by seed, then short trainings first, and parents before their children."""
    return cell["seed"], cell.get("parent_tokens", 0) + cell["steps"] * cell["tokens_per_step"]


def _check(path: str, grid: GridConfig) -> None:
    """Check the numbers of a grid and the names of its arms."""

    def require(holds: bool, key: str, got: object, expected: str, fix: str) -> None:
        if not holds:
            raise UpcycleError(f"{path}: {key}", got=got, expected=expected, fix=fix)

    for name in grid.arms:
        require(bool(_NAME.fullmatch(name)), f"arms.{name}", name, "letters, digits and _", "rename the arm")
    for name in (name for pair in grid.references.items() for name in pair):
        if name not in grid.arms:
            raise UpcycleError.unknown(f"{path}: references: arm", name, grid.arms)
    for name, arm in grid.arms.items():
        lengths = arm.lengths == sorted(set(arm.lengths)) and min(arm.lengths, default=1) > 0
        expected = "numbers of steps in increasing order"
        require(lengths, f"arms.{name}.lengths", arm.lengths, expected, "write lengths: [150, 300]")
        expected = "whole numbers, 0 or more"
        require(min(arm.seeds, default=0) >= 0, f"arms.{name}.seeds", arm.seeds, expected, "write seeds: [1]")
    require(bool(grid.arms), "arms", "none", "at least one", f"see {template('ablations')}")
    from_zero = bool(grid.seeds) and min(grid.seeds) >= 0
    require(from_zero, "seeds", grid.seeds, "whole numbers, 0 or more", "write seeds: [1, 2, 3]")
    least, fix = 2 * ROUNDING, f"write margin: {MARGIN:g}"
    expected = f"{least:g} bits per byte or more, because smaller differences are rounding errors"
    require(least <= grid.margin < math.inf, "margin", grid.margin, expected, fix)
    lows = {
        "evaluate.every_n_steps": (grid.evaluate.every_n_steps, 1),
        "evaluate.batch_size": (grid.evaluate.batch_size, 1),
        "parent.vocabulary": (grid.parent.vocabulary if grid.parent else None, 300),
    }
    for key, (value, low) in lows.items():
        require(value is None or value >= low, key, value, f"a whole number, {low} or more", f"write {max(low, 2048)}")


def _from_here(name: str, folder: Path) -> str:
    """Return the absolute path of a YAML file that a grid names; return the name of a package file unchanged."""
    return str((folder / Path(name).expanduser()).absolute()) if name.endswith((".yaml", ".yml")) else name


def _with_file(where: str, arm: ArmConfig, folder: Path) -> ArmConfig:
    """Return an arm with the recipe and the settings from the arm's own file, and check that it has one recipe."""
    if arm.file:
        content, *_ = read_conf("ablations", folder / arm.file, f"{where}: file")
        run = content.pop("run", None)
        factory = run.get("factory") if isinstance(run, dict) else None
        arm = replace(arm, factory=factory, set=dict(flat(content, ".")) | arm.set)
    if (arm.factory is None) == (arm.recipe is None):
        expected = (
            "`factory` names a recipe of NeMo (as --factory does), and `recipe` names a recipe of Megatron-Bridge"
        )
        raise UpcycleError(
            where,
            kind="state",
            got="has both factory and recipe" if arm.factory else "has neither factory nor recipe",
            expected=expected,
            fix="give either factory or recipe",
        )
    return arm
