"""The recipes of the table: found as modules, of the models that it says, fitting their machines by the planner."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import asdict
from typing import Any

import pytest

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.hardware import known_gpu, known_recipe
from nemo_upcycle.planning.recipe_table import SPEC, ModelRow, models
from nemo_upcycle.planning.recipe_table import recipes as table_recipes
from tests.golden import factory_of


#: Sequences of NeMo's classes may be shorter than the parent's; these classes are of several parents, or have none.
VOCABULARY, SMOLLM2 = 128_256, (49_152, 8192)
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
    assert module is getattr(recipes, name)
    assert name == module.NAME
    assert resolve_factory(pretrain, name) is module.pretrain_recipe
    assert resolve_factory(pl.LightningModule, name) is module.model
    for attribute in ("model", "trainer", "pretrain_recipe"):
        assert getattr(module, attribute).__doc__
    recipe = module.pretrain_recipe()
    assert (recipe.data.seq_length, recipe.data.global_batch_size) == (
        known.defaults["seq_length"],
        known.defaults["global_batch"],
    )
    _has_the_numbers_that_the_planner_takes(recipe, name)
    assert (spec_of(recipe) if recipe.resume.restore_config.spec else None) == known.spec
    assert ("performance_mode" in inspect.signature(module.pretrain_recipe).parameters) is known.h100
    assert recipe.resume.restore_config.path == known.inputs["dense"]
    if known.spec:
        assert resolve_factory(pipeline, name) is module.pipeline_recipe
        chain = module.pipeline_recipe()
        assert {key: getattr(chain, key) for key in known.inputs} == known.inputs
        config = recipe.model.config
        assert (config.num_moe_experts, config.moe_router_topk) == (SPEC.num_experts, SPEC.top_k)
        assert config.moe_router_pre_softmax is False


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
    assert _architecture(getattr(recipes, f"{row.name}_dense_ct").model().config) == row.shape


def _architecture(config: Any) -> Architecture:
    """Read the architecture of a dense NeMo model: what decides its FLOPs, its family and positions."""
    from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaConfig
    from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config

    from nemo_upcycle.models.megatron_config import architecture_of
    from nemo_upcycle.trainers.nemo.olmo2 import Olmo2Config

    kind = config.__fn_or_cls__
    vocab_size, positions = SMOLLM2 if kind is LlamaConfig else (VOCABULARY, kind.seq_length)
    hf_class, scaling = "LlamaForCausalLM", None
    if issubclass(kind, Qwen3Config):
        vocab_size, positions, hf_class = kind.vocab_size, kind.max_position_embeddings, "Qwen3ForCausalLM"
    if issubclass(kind, Olmo2Config):
        vocab_size, hf_class = kind.vocab_size, "Olmo2ForCausalLM"
    if issubclass(kind, Llama31Config):
        scaling = {"rope_type": "llama3", "factor": config.scale_factor, "low_freq_factor": config.low_freq_factor}
        scaling |= {"high_freq_factor": config.high_freq_factor}
        scaling |= {"original_max_position_embeddings": config.old_context_len}
    sizes = asdict(architecture_of(config, vocab_size))
    others = {"hf_class": hf_class, "rope_theta": float(config.rotary_base), "rope_scaling": scaling}
    return Architecture(**(sizes | others | {"max_positions": positions, "norm_eps": config.layernorm_epsilon}))


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
