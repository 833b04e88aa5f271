"""Recipes between the launcher and the stages: serialised as NeMo-Run does it, and placed into a run's folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_upcycle.connector import check_spec
from nemo_upcycle.training.layout import check_layout


def dump_recipe(recipe: run.Partial) -> str:
    """Return a recipe as text. The same recipe gives the same text."""
    return ZlibJSONSerializer().serialize(recipe)


def load_recipe(text: str) -> run.Partial:
    """Return the recipe of a text that `dump_recipe` made."""
    return ZlibJSONSerializer().deserialize(text)


def ranks_of(recipe: run.Partial) -> tuple[int, int]:
    """Return the nodes and the ranks per node that a recipe's trainer asks for."""
    return recipe.trainer.num_nodes or 1, int(recipe.trainer.devices)


def check_recipe(recipe: run.Partial) -> None:
    """Check a recipe before it is launched.

    Raises:
        SpecError: layout, model, data and ranks do not fit, or the upcycling spec is not valid or not the model's.
    """
    nodes, per_node = ranks_of(recipe)
    check_layout(recipe.trainer.strategy, recipe.model.config, recipe.data, nodes * per_node)
    if recipe.resume.restore_config.spec:
        check_spec(recipe.model.config, spec_of(recipe))


def spec_of(recipe: run.Partial) -> Any:
    """Return the upcycling spec of a recipe, built (and so checked)."""
    return fdl.build(recipe.resume.restore_config.spec)


def model_config(recipe: run.Partial, *, dense: bool) -> Any:
    """Return the NeMo model config of an upcycling recipe, or that of its dense parent, built."""
    config = copy.deepcopy(recipe.model.config)
    if dense:
        config.num_moe_experts = None
    return fdl.build(config)


def place_recipe(recipe: run.Partial, folder: Path, dense_folder: Path, data_folder: Path) -> None:
    """Point a recipe to a run's folders, in place.

    Args:
        recipe: of a training stage.
        folder: where logs and checkpoints go.
        dense_folder: the dense parent.
        data_folder: the prepared corpus.
    """
    recipe.log.explicit_log_dir = str(folder)
    recipe.log.log_dir = None
    recipe.resume.restore_config.path = str(dense_folder)
    recipe.data.dense = str(dense_folder)
    recipe.data.folder = str(data_folder)
