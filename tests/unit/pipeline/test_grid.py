"""The grids that come with the package: every arm is a recipe that can start."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

import nemo_upcycle.recipes  # noqa: F401  registers them, as the command `nemo` does
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.pipeline.ablations.grid import read_grid
from nemo_upcycle.pipeline.ablations.stages import GridPlan
from nemo_upcycle.pipeline.order import before
from nemo_upcycle.recipes import h100
from nemo_upcycle.reporting.grid import COSTS_APART
from nemo_upcycle.trainers.nemo.recipes import load_recipe


CONF = Path(str(resources.files("nemo_upcycle.conf")))


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


def test_all_arms_of_a_seed_read_the_data_in_one_order(laptop: GridPlan) -> None:
    """The dense ones, too: a difference would else be one of other texts."""
    seeds = {cell: load_recipe(text).data.seed for cell, text in laptop.cells.items()}
    assert seeds == {cell: about["seed"] for cell, about in laptop.described["cells"].items()}
    assert {cell.partition("-")[0] for cell in seeds} >= {"dense", "moe", "drop"}


def test_arms_are_scored_where_their_flops_are_equal(laptop: GridPlan) -> None:
    """As the paper's arm counts them: full attention."""
    flops = {}
    for arm in ("dense", "moe"):
        recipe = load_recipe(laptop.cells[f"{arm}-seed1"])
        arch, length = architecture_of(recipe.model.config, 2048), recipe.data.seq_length
        flops[arm] = flops_per_token(arch, length, causal=False)
        callback = recipe.trainer.callbacks[-1]
        assert recipe.trainer.max_steps % callback.every_n_steps == 0
    # Both are scored every 31 steps, up to 372: 7 * 31 of the MoE are 10 * 31 of the parent.
    assert 7 * flops["moe"] == pytest.approx(10 * flops["dense"], rel=COSTS_APART)


def test_the_learning_rate_stays_so_that_a_curve_gives_every_budget(laptop: GridPlan) -> None:
    recipe = load_recipe(laptop.cells["moe-seed1"])
    assert recipe.optim.lr_scheduler.min_lr == recipe.optim.config.lr
    assert laptop.described["cells"]["moe-seed1"]["is_rate_constant"]
    step_tokens = recipe.data.global_batch_size * recipe.data.seq_length
    assert max(laptop.described["budgets"]["tokens"]) == recipe.trainer.max_steps * step_tokens


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ("{arms: [dense, moes], tokens: [5120, 10240]}", "Did you mean 'moe'?"),
        ("{arms: [dense], tokens: [5120, 10240]}", "budgets.arms: got ['dense']"),
        ("{arms: [dense, moe]}", "budgets.tokens: got nothing"),
        ("{arm: [dense, moe]}", "Did you mean 'arms'?"),
        (
            "{arms: [dense, moe], tokens: [5120, 6144]}",
            "tokens of dense: got [6144], expected tokens after which it is",
        ),
    ],
)
def test_budgets_name_arms_and_tokens_that_are_scored(tmp_path: Path, budgets: str, message: str) -> None:
    text = (CONF / "ablations/mini.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(f"{text}\nbudgets: {budgets}\n")
    with pytest.raises(UpcycleError, match=re.escape(message)):
        read_grid(tmp_path / "mine.yaml")


@pytest.mark.parametrize("margin", ["0", "-0.01", "true", "wide", ".inf", ".nan", "0.0003"])
def test_a_margin_is_more_than_rounding(tmp_path: Path, margin: str) -> None:
    text = (CONF / "ablations/mini.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(f"{text}\nmargin: {margin}\n")
    with pytest.raises(UpcycleError, match="margin: got"):
        read_grid(tmp_path / "mine.yaml")


def test_the_table_knows_the_margin_and_what_tells_schedules_apart(laptop: GridPlan) -> None:
    assert laptop.described["margin"] == 0.002
    schedules = {about["schedule"] for about in laptop.described["cells"].values()}
    assert len(schedules) == 1
    assert "min_lr=0.0006" in schedules.pop()


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


def test_the_papers_grid_takes_the_papers_blend_and_knows_that_its_learning_rates_fall() -> None:
    plan = read_grid("paper")
    assert plan.data == h100.DATA
    cells = plan.described["cells"]
    assert not any(about["is_rate_constant"] for about in cells.values())
    lengths = {name: (cells[f"{name}-seed1"]["steps"]) for name in ("capacity_4", "dense", "dense_equal_flops")}
    assert lengths == {"capacity_4": 6438, "dense": 6438, "dense_equal_flops": 10199}
    assert cells["capacity_4-seed1"]["schedule"] == cells["dense-seed1"]["schedule"]
    assert "lr=3e-05, CosineAnnealingScheduler(" in cells["dense-seed1"]["schedule"]
