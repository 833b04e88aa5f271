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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("router_order: soft", "router_ordr: soft", "arms.st: spec: got"),
        ("trainer.max_steps: 10", "trainer.max_step: 10", "Did you mean 'trainer.max_steps'?"),
        ("seeds:", "sedes:", "Did you mean 'seeds'?"),
        ("{moe: dense", "{moe: dens", "Did you mean 'dense'?"),
        ("arms:", "arms: {}\nabout2:", "about2"),
        ("suite: laptop", "suite: paper", "expected a local suite with heldout_perplexity"),
        ("data: sotu", "data: messages", "data: got messages: conversations, expected texts"),
    ],
)
def test_a_mistake_in_a_grid_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (CONF / "ablations/mini.yaml").read_text()
    assert text.count(old) == 1
    (tmp_path / "mine.yaml").write_text(text.replace(old, new))
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


@pytest.fixture(scope="module")
def budget() -> GridPlan:
    return read_grid("budget")


def test_the_budget_grid_has_every_budget_of_the_parent_with_every_budget_after_it(budget: GridPlan) -> None:
    points = [cell for cell in budget.described["cells"].values() if cell["is_length"]]
    found = {(cell["parent_tokens"], cell["steps"] * cell["tokens_per_step"], cell["experts"]) for cell in points}
    parents, after = (2498560, 4997120, 10002432, 19996672), (1253376, 4997120)
    expected = {(parent, tokens, kind) for parent in parents for tokens in after for kind in (1, 8)}
    assert found == expected | {(0, tokens, 1) for tokens in parents} | {(0, tokens, 8) for tokens in parents[:3]}
    assert len(points) == 2 * len(found)  # seeds


def test_the_budget_grid_is_forecast_to_take_at_most_four_hours_on_two_cores(budget: GridPlan) -> None:
    """Measured on one core of an Intel Xeon (AMX): tokens a second, and the seconds around the steps."""
    tokens_per_s, around_s = {1: 34_000, 8: 21_000}, 30
    cells = budget.described["cells"].values()
    busy_s = sum(cell["steps"] * cell["tokens_per_step"] / tokens_per_s[cell["experts"]] + around_s for cell in cells)
    assert len(cells) == 56
    assert 1 < busy_s / 2 / 3600 < 4


def test_what_starts_from_a_training_of_the_grid_comes_after_its_export(budget: GridPlan) -> None:
    names = [stage.name for stage in budget.stages]
    assert "parent" not in names  # no arm starts from it
    needed = [stage.name for stage in before(budget, "moe_5m-153-seed2")]
    parent = "dense_from_nothing-610-seed2"
    assert needed == ["untrained", "data", "suite", parent, f"{parent}-hf"]
    assert [stage.name for stage in before(budget, "moe_from_nothing-305-seed1")] == ["untrained", "data", "suite"]


def test_every_point_has_a_schedule_of_its_own(budget: GridPlan) -> None:
    for steps in (153, 610):
        recipe = load_recipe(budget.cells[f"moe_5m-{steps}-seed1"])
        assert recipe.trainer.max_steps == steps
        assert recipe.optim.lr_scheduler.min_lr == pytest.approx(recipe.optim.config.lr / 10)
        assert recipe.optim.lr_scheduler.constant_steps == 0


def test_what_a_parent_has_read_is_left_out_after_it(budget: GridPlan) -> None:
    for parent, steps in (("2m", 305), ("20m", 2441)):
        for arm in ("dense", "moe"):
            assert load_recipe(budget.cells[f"{arm}_{parent}-153-seed2"]).data.skip_samples == steps * 32
    assert load_recipe(budget.cells["dense_from_nothing-305-seed1"]).data.skip_samples is None


def test_an_moe_from_nothing_has_experts_of_its_own(budget: GridPlan) -> None:
    spec = load_recipe(budget.cells["moe_from_nothing-305-seed1"]).resume.restore_config.spec
    assert (spec.method, spec.drop_ratio) == ("drop", 1.0)


def test_a_seed_is_trained_before_the_next_one_begins_and_short_ones_first(budget: GridPlan) -> None:
    cells = [budget.described["cells"][name] for name in budget.cells]
    assert [cell["seed"] for cell in cells] == sorted(cell["seed"] for cell in cells)
    tokens = [cell["parent_tokens"] + cell["steps"] * cell["tokens_per_step"] for cell in cells if cell["seed"] == 1]
    assert tokens == sorted(tokens)


@pytest.fixture
def own_parents(tmp_path: Path) -> Path:
    """A grid with a parent of its own, at one of two lengths."""
    text = (CONF / "ablations/mini.yaml").read_text()
    arms = """arms:
  dense: {factory: "llama_1m_dense_ct(dense='parent')", lengths: [5, 10], parent: untrained}
  moe: {factory: "llama_1m_e8t2(dense='parent')", parent: dense-10, seeds: [2]}
"""
    path = tmp_path / "mine.yaml"
    path.write_text(text[: text.index("arms:")] + arms)
    return path


def test_an_arm_starts_from_the_training_that_it_names(own_parents: Path) -> None:
    plan = read_grid(own_parents)
    assert list(plan.cells) == ["dense-5-seed1", "dense-10-seed1", "dense-5-seed2", "dense-10-seed2", "moe-seed2"]
    assert plan.parents["moe-seed2"] == "dense-10-seed2"
    assert plan.described["cells"]["moe-seed2"]["parent_tokens"] == 10 * 4 * 256
    assert plan.described["cells"]["moe-seed2"]["is_length"] is False


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("untrained}", "moe}", "arms.dense.parent of seed 1"),  # what comes later
        (
            "dense-10,",
            "dense-11,",
            "arms.moe.parent of seed 2 'dense-11' does not exist. Did you mean 'dense-10'? Valid: dense-10, dense-5,",
        ),
        (
            "parent: dense-10, seeds: [2]",
            "parent: untrained}\n  more: {factory: \"llama_1m_dense_ct(dense='parent')\", parent: moe",
            "arms.more.parent of seed 1 'moe'",
        ),
        ("[5, 10]", "[10, 5]", "arms.dense.lengths: got [10, 5]"),
        ("seeds: [2]", "seeds: [-1]", "arms.moe.seeds: got [-1]"),
        ("seeds: [2]", "seeds: [3]", "arms.moe.parent of seed 3"),  # no parent has it
    ],
)
def test_parents_lengths_and_seeds_are_checked(own_parents: Path, old: str, new: str, message: str) -> None:
    text = own_parents.read_text()
    assert old in text
    own_parents.write_text(text.replace(old, new))
    with pytest.raises(UpcycleError, match=re.escape(message)):
        read_grid(own_parents)


def test_a_grid_that_trains_its_parents_takes_no_other(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="Fix: omit dense="):
        read_grid("budget", dense=str(tmp_path))


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


def test_arms_of_the_grid_of_routers_differ_from_their_references_in_one_thing() -> None:
    """What a router starts from, its scores, what balances or teaches it."""
    routers = read_grid("routers")
    recipes = {name[: -len("-seed1")]: load_recipe(text) for name, text in routers.cells.items() if "seed1" in name}
    names = ("num_experts", "top_k", "granularity", "method")
    for arm, reference in routers.described["references"].items():
        one, other = recipes[arm], recipes[reference]
        specs = [recipe.resume.restore_config.spec for recipe in (one, other)]
        assert len({tuple(getattr(spec, name) for name in names) for spec in specs}) == 1
        assert one.data == other.data
        assert one.trainer.max_steps == other.trainer.max_steps
        balanced = [
            (config.moe_router_load_balancing_type, config.moe_router_enable_expert_bias)
            for config in (one.model.config, other.model.config)
        ]
        taught = [getattr(recipe.optim, "dense_router_gradient", False) for recipe in (one, other)]
        drawn = [(spec.router_std, spec.router_score) for spec in specs]
        assert sum(pair[0] != pair[1] for pair in (balanced, taught, drawn)) == 1, arm
    once = {"random_narrow_loss", "random_sigmoid_loss", "random_dense_gradient"}
    assert len(routers.cells) == 3 * len(recipes) - 2 * len(once) == 12


def test_arms_of_the_grid_of_fp8_differ_in_their_precision_alone() -> None:
    fp8 = read_grid("fp8")
    recipes = {name[: -len("-seed1")]: load_recipe(text) for name, text in fp8.cells.items() if "seed1" in name}
    kinds = {name: (recipe.trainer.plugins.fp8, recipe.trainer.plugins.fp8_recipe) for name, recipe in recipes.items()}
    assert kinds["bf16"][0] is None
    assert kinds["delayed"] == kinds["delayed_short"] == ("hybrid", "delayed")
    assert (kinds["current"], kinds["blockwise"]) == (("hybrid", "tensorwise"), ("hybrid", "blockwise"))
    assert kinds["mxfp8"] == ("e4m3", "mxfp8")
    assert {recipe.trainer.plugins.precision for recipe in recipes.values()} == {"bf16-mixed"}
    for name, recipe in recipes.items():
        kind = name.partition("_")[2]
        reference = recipes[f"bf16_{kind}"] if kind in ("fast", "uneven") else recipes["bf16"]
        assert (recipe.model, recipe.optim) == (reference.model, reference.optim), name
