"""The recipes of each file are registered, have the numbers at the top of the file, and fit their GPUs."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from nemo_upcycle.planning.hardware import known_gpu, known_parent
from nemo_upcycle.planning.recipe_table import KnownRecipe
from nemo_upcycle.recipes import known_recipe, known_recipes, recipe_file
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.utils import moved
from tests.golden import factory_of


FILE = "recipes/llama3_8b.py"
IN_NEMO = [known for known in known_recipes().values() if "nemo" in known.trainers]
PRETRAINED = [known.name for known in IN_NEMO if not known.tunes]
ON_H100 = [name for name in PRETRAINED if known_recipe(name).h100]


def test_a_recipes_file_imports_no_trainer() -> None:
    code = "import sys; from nemo_upcycle.recipes import modules; print(len(modules()), *sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(answer[0]) == 18
    assert {name.partition(".")[0] for name in answer}.isdisjoint({"nemo", "nemo_run", "megatron", "lightning"})


@pytest.mark.parametrize("old", [module.name for module in pkgutil.iter_modules(moved.__path__)])
def test_a_moved_module_names_its_new_place(old: str) -> None:
    with pytest.raises(ImportError, match=f"nemo_upcycle.recipes.{old} has moved") as raised:
        importlib.import_module(f"nemo_upcycle.recipes.{old}")
    for place in re.findall(r"nemo_upcycle\.[a-z0-9_.]+[a-z0-9]", str(raised.value))[1:]:
        assert importlib.util.find_spec(place), place


@pytest.mark.parametrize("known", known_recipes().values(), ids=lambda known: known.name)
def test_a_recipes_parent_is_a_row_with_its_address(known: KnownRecipe) -> None:
    assert known_parent(known.inputs["dense"]) == known.dense


def test_a_recipes_file_is_named_for_both_trainers() -> None:
    of_bridge = "llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config"
    assert [recipe_file(name) for name in ("llama3_8b_e8t2_sft", of_bridge, "of_a_user")] == [FILE, FILE, ""]


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_recipe_is_registered_with_its_files_numbers(recipes: Any, name: str) -> None:
    import lightning.pytorch as pl
    from nemo.collections.llm.api import pretrain
    from nemo_run.cli.api import resolve_factory

    from nemo_upcycle.pipeline.nemo.pipeline import pipeline
    from nemo_upcycle.trainers.nemo.recipes import recipe_spec

    module, known = getattr(recipes, name), known_recipe(name)
    recipe = module.pretrain_recipe()
    assert resolve_factory(pretrain, name)() == recipe
    assert resolve_factory(pl.LightningModule, name)() == module.model()
    _has_the_numbers_that_the_planner_takes(recipe, name)
    assert (recipe_spec(recipe) if recipe.resume.restore_config.spec else None) == known.spec
    assert ("performance_mode" in inspect.signature(module.pretrain_recipe).parameters) is known.h100
    assert recipe.resume.restore_config.path == known.inputs["dense"]
    if known.spec:
        chain = module.pipeline_recipe()
        assert resolve_factory(pipeline, name)() == chain
        assert {key: getattr(chain, key) for key in known.inputs} == known.inputs


@pytest.mark.parametrize("name", [known.name for known in IN_NEMO if known.tunes])
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


@pytest.mark.parametrize("known", [one for one in IN_NEMO if not (one.spec or one.tunes)], ids=lambda one: one.name)
def test_a_parents_shape_is_that_of_nemos_configuration(recipes: Any, known: KnownRecipe) -> None:
    """The number of positions is excluded, because NeMo's classes may have shorter sequences than the parent."""
    from nemo_upcycle.models.megatron_config import architecture_of

    config, shape = getattr(recipes, known.name).model().config, known.dense
    found = architecture_of(config, getattr(config, "vocab_size", None) or shape.vocab_size)
    names = ("hf_class", "rope_theta", "rope_scaling", "max_positions", "norm_eps")
    assert replace(found, **{name: getattr(shape, name) for name in names}) == shape
    assert (config.rotary_base, config.layernorm_epsilon) == (shape.rope_theta, shape.norm_eps)
    assert getattr(config, "scale_factor", None) == (shape.rope_scaling or {}).get("factor")


@pytest.mark.parametrize("name", ON_H100)
def test_layouts_for_h100_fit_by_the_planner(recipes: Any, name: str) -> None:
    from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of
    from nemo_upcycle.trainers.nemo.checks import check_recipe
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.nemo.training import NeMoTraining

    recipe = getattr(recipes, name).pretrain_recipe()
    check_recipe(recipe)
    facts = NeMoTraining(dump_recipe(recipe)).facts(Parent(""))
    first, later = plans_of(facts, known_gpu("h100"))
    expected = "tight" if name == "qwen3_8b_dense_ct" else "fits"  # 73.1 of 79.1 GiB
    assert (first.verdict, later.verdict) == (expected, expected)
