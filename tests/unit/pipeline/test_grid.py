"""Grids from their YAML files: arms, seeds, parents and lengths; packaged grids can start."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import nemo_upcycle.pipeline.nemo.recipes  # noqa: F401  registers them, as the command `nemo` does
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.ablations.grid import read_grid
from nemo_upcycle.pipeline.ablations.stages import GridPlan
from nemo_upcycle.pipeline.order import before
from nemo_upcycle.recipes import llama3_8b
from nemo_upcycle.trainers.nemo.recipes import load_recipe


MINI = (Path(str(resources.files("nemo_upcycle.conf"))) / "ablations/mini.yaml").read_text(encoding="utf-8")
#: A grid in which one arm has two lengths, and its model at the greater length is the parent of another arm.
OWN_PARENTS = f"""{MINI[: MINI.index("arms:")]}
arms:
  dense: {{factory: "llama_1m_dense_ct(dense='parent')", lengths: [5, 10], parent: untrained}}
  moe: {{factory: "llama_1m_e8t2(dense='parent')", parent: dense-10, seeds: [2]}}
"""


def grid_of(folder: Path, text: str) -> GridPlan:
    """Read a grid from a file with this text."""
    (folder / "mine.yaml").write_text(text)
    return read_grid(folder / "mine.yaml")


def of_seed_1(plan: GridPlan) -> dict[str, Any]:
    """Return the recipes of the first seed, by arm."""
    return {name[: -len("-seed1")]: load_recipe(text) for name, text in plan.cells.items() if name.endswith("-seed1")}


@pytest.fixture(scope="module")
def laptop() -> GridPlan:
    return read_grid("laptop")


def test_arms_of_a_seed_read_data_in_one_order(laptop: GridPlan) -> None:
    """The dense arms read the same texts, too; otherwise a difference could come from the texts."""
    one, two = (load_recipe(laptop.cells[f"moe-seed{seed}"]) for seed in (1, 2))
    assert (one.resume.restore_config.spec.seed, two.resume.restore_config.spec.seed) == (1, 2)
    assert (one.trainer, one.model) == (two.trainer, two.model)
    seeds = {cell: load_recipe(text).data.seed for cell, text in laptop.cells.items()}
    assert seeds == {cell: about["seed"] for cell, about in laptop.described["cells"].items()}
    assert {cell.partition("-")[0] for cell in seeds} >= {"dense", "moe", "drop"}


def test_the_table_knows_the_margin_and_what_tells_schedules_apart(laptop: GridPlan) -> None:
    """With a constant learning rate, one curve shows the result for every budget."""
    assert laptop.described["margin"] == 0.002
    assert laptop.described["cells"]["moe-seed1"]["is_rate_constant"]
    (schedule,) = {about["schedule"] for about in laptop.described["cells"].values()}
    assert "min_lr=0.0006" in schedule


def test_a_plan_is_read_as_it_was_written(laptop: GridPlan, tmp_path: Path) -> None:
    laptop.write(tmp_path)
    assert GridPlan.read(tmp_path) == laptop
    assert [stage.name for stage in before(laptop, "moe-seed2")] == ["untrained", "data", "parent", "dense", "suite"]
    assert len(before(laptop, "table")) == len(laptop.stages) - 1


@pytest.mark.parametrize(
    ("old", "new", "subject", "got"),
    [
        ("seeds:", "sedes:", "key", "sedes"),
        ("{moe: dense", "{moe: dens", "references: arm", "dens"),
        ("arms:", "arms: {}\nabout2:", "key", "about2"),
        ("suite: laptop", "suite: paper", "evaluate.suite", "paper"),
        ("seeds:", "margin: 0.0003\nseeds:", "margin", 0.0003),
    ],
)
def test_a_mistake_in_a_grid_is_named(tmp_path: Path, old: str, new: str, subject: str, got: object) -> None:
    assert MINI.count(old) == 1
    with pytest.raises(UpcycleError) as refused:
        grid_of(tmp_path, MINI.replace(old, new))
    assert refused.value.subject == f"{tmp_path}/mine.yaml: {subject}"
    assert str(refused.value.got) == str(got)


def test_a_grids_arms_have_existing_settings(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"arms\.dense: .* Did you mean 'trainer\.max_steps'"):
        grid_of(tmp_path, MINI.replace("trainer.max_steps: 10", "trainer.max_step: 10"))
    with pytest.raises(UpcycleError, match=r"arms\.st: spec has fields"):
        grid_of(tmp_path, MINI.replace("router_order: soft", "router_ordr: soft"))
    with pytest.raises(UpcycleError, match="Data messages are conversations"):
        grid_of(tmp_path, MINI.replace("data: sotu", "data: messages"))


def test_an_arm_starts_after_the_export_it_names(tmp_path: Path) -> None:
    plan = grid_of(tmp_path, OWN_PARENTS)
    assert list(plan.cells) == ["dense-5-seed1", "dense-10-seed1", "dense-5-seed2", "dense-10-seed2", "moe-seed2"]
    assert plan.parents["moe-seed2"] == "dense-10-seed2"
    cells = plan.described["cells"]
    assert cells["moe-seed2"]["parent_tokens"] == 10 * 4 * 256
    assert (cells["moe-seed2"]["is_length"], cells["dense-5-seed1"]["is_length"]) == (False, True)
    needed = [stage.name for stage in before(plan, "moe-seed2")]
    assert needed == ["untrained", "data", "suite", "dense-10-seed2", "dense-10-seed2-hf"]
    recipes = {name: load_recipe(text) for name, text in plan.cells.items()}
    assert recipes["moe-seed2"].data.skip_samples == 10 * 4, "what the parent has read"
    assert recipes["dense-10-seed1"].data.skip_samples is None
    assert [recipes[f"dense-{steps}-seed1"].trainer.max_steps for steps in (5, 10)] == [5, 10]


@pytest.mark.parametrize(
    ("old", "new", "subject", "got"),
    [
        ("untrained}", "moe}", "dense.parent of seed 1", "moe"),  # an arm that comes later
        ("dense-10,", "dense-11,", "moe.parent of seed 2", "dense-11"),
        ("[5, 10]", "[10, 5]", "dense.lengths", [10, 5]),
        ("seeds: [2]", "seeds: [-1]", "moe.seeds", [-1]),
        ("seeds: [2]", "seeds: [3]", "moe.parent of seed 3", "dense-10"),  # no parent has this seed
    ],
)
def test_parents_lengths_and_seeds_are_checked(tmp_path: Path, old: str, new: str, subject: str, got: object) -> None:
    assert old in OWN_PARENTS
    with pytest.raises(UpcycleError) as refused:
        grid_of(tmp_path, OWN_PARENTS.replace(old, new))
    assert (refused.value.subject, refused.value.got) == (f"{tmp_path}/mine.yaml: arms.{subject}", got)


def test_a_grid_that_trains_its_parents_takes_no_other(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="Omit dense="):
        read_grid("budget", dense=str(tmp_path))


def test_the_papers_grid_takes_the_papers_blend() -> None:
    plan = read_grid("paper")
    assert plan.data == llama3_8b.DATA
    assert load_recipe(plan.cells["capacity_1-seed3"]).model.config.moe_expert_capacity_factor == 1.0
    cells = plan.described["cells"]
    assert not any(about["is_rate_constant"] for about in cells.values())
    assert [cells[f"{name}-seed1"]["steps"] for name in ("dense", "dense_equal_flops")] == [6438, 10199]
    assert cells["capacity_4-seed1"]["schedule"] == cells["dense-seed1"]["schedule"]


@pytest.mark.parametrize("name", ["routers", "fp8"])
def test_arms_differ_from_references_in_what_their_grid_is_about(name: str) -> None:
    plan = read_grid(name)
    recipes, references = of_seed_1(plan), plan.described["references"]
    for arm, reference in references.items():
        one, other = recipes[arm], recipes[reference]
        assert (one.data, one.trainer.max_steps) == (other.data, other.trainer.max_steps), arm
        if name == "fp8":
            assert (one.model, one.optim) == (other.model, other.optim), arm
            assert one.trainer.plugins != other.trainer.plugins, arm
        elif arm != "granular":
            specs = [recipe.resume.restore_config.spec for recipe in (one, other)]
            for field in ("num_experts", "top_k", "granularity", "method"):
                assert len({getattr(spec, field) for spec in specs}) == 1, arm
    assert len(references) > 3
