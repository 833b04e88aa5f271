"""The recipes of the table: found as modules, of the models that it says, fitting their machines by the planner."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from typing import Any

import pytest

from nemo_upcycle.planning.hardware import known_gpu, known_recipe
from nemo_upcycle.planning.recipe_table import ModelRow, models
from nemo_upcycle.planning.recipe_table import recipes as table_recipes
from tests.golden import factory_of


PRETRAINED = [name for name in table_recipes("nemo") if not name.endswith("_sft")]
ON_H100 = [name for name in PRETRAINED if known_recipe(name).h100]


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_recipe_is_a_module_with_what_its_row_says(recipes: Any, name: str) -> None:
    import lightning.pytorch as pl
    from nemo.collections.llm.api import pretrain
    from nemo_run.cli.api import resolve_factory

    from nemo_upcycle.pipeline.nemo.pipeline import pipeline
    from nemo_upcycle.trainers.nemo.recipes import spec_of

    module, known = importlib.import_module(f"nemo_upcycle.recipes.{name}"), known_recipe(name)
    assert (module, name) == (getattr(recipes, name), module.NAME)
    assert resolve_factory(pretrain, name) is module.pretrain_recipe
    assert resolve_factory(pl.LightningModule, name) is module.model
    recipe = module.pretrain_recipe()
    _has_the_numbers_that_the_planner_takes(recipe, name)
    assert (spec_of(recipe) if recipe.resume.restore_config.spec else None) == known.spec
    assert ("performance_mode" in inspect.signature(module.pretrain_recipe).parameters) is known.h100
    assert recipe.resume.restore_config.path == known.inputs["dense"]
    if known.spec:
        assert resolve_factory(pipeline, name) is module.pipeline_recipe
        chain = module.pipeline_recipe()
        assert {key: getattr(chain, key) for key in known.inputs} == known.inputs


@pytest.mark.parametrize("name", [name for name in table_recipes("nemo") if name.endswith("_sft")])
def test_a_tuning_has_the_numbers_that_the_planner_takes(recipes: Any, name: str) -> None:
    recipe = factory_of(getattr(recipes, name))()
    known = known_recipe(name)
    _has_the_numbers_that_the_planner_takes(recipe, name)
    peft = getattr(recipe, "peft", None)
    assert (peft.dim if peft else None) == known.defaults.get("lora")
    assert recipe.resume.restore_config.path == known.inputs["dense"]


def _has_the_numbers_that_the_planner_takes(recipe: Any, name: str) -> None:
    known, data, config = known_recipe(name).defaults, recipe.data, recipe.model.config
    tokens = float(f"{recipe.trainer.max_steps * data.global_batch_size * data.seq_length:.4g}")
    found = {"seq_length": data.seq_length, "global_batch": data.global_batch_size, "tokens": tokens}
    found |= {"capacity_factor": config.moe_expert_capacity_factor}
    found |= {"gradients": "fp32" if recipe.trainer.strategy.ddp.grad_reduce_in_fp32 else "bf16"}
    assert found == {key: known[key] for key in found}


@pytest.mark.parametrize("row", (row for row in models().values() if "nemo" in row.trainers), ids=lambda row: row.name)
def test_a_rows_shape_is_that_of_nemos_configuration(recipes: Any, row: ModelRow) -> None:
    """But for its positions: sequences of NeMo's classes may be shorter than the parent's."""
    from nemo_upcycle.models.megatron_config import architecture_of

    config, shape = getattr(recipes, f"{row.name}_dense_ct").model().config, row.shape
    found = architecture_of(config, getattr(config, "vocab_size", None) or shape.vocab_size)
    names = ("hf_class", "rope_theta", "rope_scaling", "max_positions", "norm_eps")
    assert replace(found, **{name: getattr(shape, name) for name in names}) == shape
    assert (config.rotary_base, config.layernorm_epsilon) == (shape.rope_theta, shape.norm_eps)
    assert getattr(config, "scale_factor", None) == (shape.rope_scaling or {}).get("factor")


@pytest.mark.parametrize("name", ON_H100)
def test_a_rows_layouts_fit_by_the_planner(recipes: Any, name: str) -> None:
    from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of
    from nemo_upcycle.trainers.nemo.checks import check_recipe
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    recipe = getattr(recipes, name).pretrain_recipe()
    check_recipe(recipe)
    facts = NeMoTraining(dump_recipe(recipe)).facts("")
    first, later = plans_of(facts, known_gpu("h100"))
    expected = "tight" if name == "qwen3_8b_dense_ct" else "fits"  # 73.1 of 79.1 GiB
    assert (first.verdict, later.verdict) == (expected, expected)
