"""The recipes of one table: each row's layouts fit its machines, by the planner, and are what the recipe has."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_upcycle.planning.commands import BRIDGE_RECIPES
from tests.golden import TABLE


@pytest.fixture(scope="module")
def recipes() -> Any:
    from nemo_upcycle import recipes

    return recipes


def test_the_table_has_the_rows_that_have_golden_files(recipes: Any) -> None:
    assert tuple(recipes.h100_table.ROWS) == TABLE
    assert set(TABLE) <= {name.removesuffix("_e8t2") for name in BRIDGE_RECIPES}


@pytest.mark.parametrize("name", [f"{base}_{kind}" for base in TABLE for kind in ("e8t2", "dense_ct")])
def test_a_rows_layouts_fit_by_the_planner(recipes: Any, name: str) -> None:
    from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of
    from nemo_upcycle.planning.hardware import known_gpu
    from nemo_upcycle.trainers.nemo.checks import check_recipe
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    recipe = getattr(recipes, name).pretrain_recipe()
    check_recipe(recipe)
    facts = NeMoTraining(dump_recipe(recipe)).facts("")
    first, later = plans_of(facts, known_gpu("h100"))
    assert (first.verdict, later.verdict) == ("fits", "fits")
