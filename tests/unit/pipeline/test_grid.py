"""The grids that come with the package: every arm is a recipe that can start."""

from __future__ import annotations

from pathlib import Path

import pytest

import nemo_upcycle.recipes  # noqa: F401  registers them, as the command `nemo` does
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.pipeline.ablations.grid import read_grid
from nemo_upcycle.pipeline.ablations.plan import GridPlan
from nemo_upcycle.pipeline.order import before
from nemo_upcycle.pipeline.recipes_io import load_recipe


@pytest.fixture(scope="module")
def laptop() -> GridPlan:
    return read_grid("laptop")


def test_arms_differ_by_what_they_say(laptop: GridPlan) -> None:
    recipes = {name: load_recipe(text) for name, text in laptop.cells.items() if name.endswith("seed1")}
    config = {name.removesuffix("-seed1"): recipe.model.config for name, recipe in recipes.items()}
    assert config["st"].moe_router_pre_softmax is True
    assert config["capacity_1"].moe_expert_capacity_factor == 1.0
    assert (config["granular_shared"].num_moe_experts, config["granular_shared"].moe_router_topk) == (16, 4)
    assert config["granular_shared"].moe_ffn_hidden_size * 2 == config["moe"].ffn_hidden_size
    specs = {name: recipe.resume.restore_config.spec for name, recipe in recipes.items()}
    assert specs["dense-seed1"] is None
    assert specs["noise-seed1"].method == "noise"
    assert len(set(laptop.cells.values())) == len(laptop.cells)


def test_a_seed_changes_data_and_spec_alone(laptop: GridPlan) -> None:
    one, two = (load_recipe(laptop.cells[f"moe-seed{seed}"]) for seed in (1, 2))
    assert (one.data.seed, two.data.seed) == (1, 2)
    assert (one.resume.restore_config.spec.seed, two.resume.restore_config.spec.seed) == (1, 2)
    assert one.trainer == two.trainer
    assert one.model == two.model


def test_the_arm_of_equal_flops_has_them(laptop: GridPlan) -> None:
    """As the paper's arm counts them: full attention."""
    flops = {}
    for arm in ("dense_equal_flops", "moe"):
        recipe = load_recipe(laptop.cells[f"{arm}-seed1"])
        arch, length = architecture_of(recipe.model.config, 2048), recipe.data.seq_length
        flops[arm] = recipe.trainer.max_steps * flops_per_token(arch, length, causal=False)
    assert flops["dense_equal_flops"] == pytest.approx(flops["moe"], rel=0.005)


def test_a_plan_is_read_as_it_was_written(laptop: GridPlan, tmp_path: Path) -> None:
    laptop.write(tmp_path)
    assert GridPlan.read(tmp_path) == laptop


def test_every_training_needs_the_parent_and_the_data_alone(laptop: GridPlan) -> None:
    assert [stage.name for stage in before(laptop, "moe-seed2")] == ["untrained", "data", "parent", "dense", "suite"]
    assert len(before(laptop, "table")) == len(laptop.stages) - 1


def test_the_papers_grid_takes_any_parent_and_data(tmp_path: Path) -> None:
    plan = read_grid("paper", dense="/models/Llama-3-8B", data="fineweb_edu_academic_7_3")
    assert (plan.dense, plan.parent) == ("/models/Llama-3-8B", None)
    assert {name.partition("-")[0] for name in plan.cells} >= {"capacity_1", "capacity_2", "capacity_4", "dropless"}
    recipe = load_recipe(plan.cells["capacity_1-seed3"])
    assert recipe.trainer.max_steps == 6438
    assert recipe.model.config.moe_expert_capacity_factor == 1.0
