"""The recipes: the paper's numbers and ablations, golden files, and builds without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest

from nemo_upcycle.models.flops import flops_per_token
from tests.golden import GOLDEN, PAIRS, golden_path, pairs_text, text_of


#: The paper's training, and a training of few steps.
LLAMA, DEMO = "llama3_8b", "smollm2_135m"
NAMES = tuple(f"{base}_{kind}" for base in (LLAMA, DEMO, "qwen3_600m") for kind in ("e8t2", "dense_ct"))
ABLATIONS = sorted((Path(__file__).parents[3] / "conf/ablations/arms").glob("*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablation_is_a_recipe_with_27b_tokens(recipes: Any, path: Path) -> None:
    """Read the file as `nemo llm pretrain --yaml FILE` does."""
    from nemo.collections.llm.api import pretrain
    from nemo_run.cli.lazy import LazyEntrypoint

    from nemo_upcycle.models.megatron_config import architecture_of
    from nemo_upcycle.trainers.nemo.checks import check_recipe
    from nemo_upcycle.trainers.nemo.recipes import recipe_spec

    recipe = LazyEntrypoint(pretrain, yaml=str(path)).resolve()
    check_recipe(recipe)
    assert recipe.log.name == path.stem
    assert recipe.trainer.num_nodes == 16
    tokens = recipe.trainer.max_steps * 512 * 8192
    if path.stem == "dense_ct_equal_flops":
        dense, moe = (
            flops_per_token(architecture_of(getattr(recipes, name).model().config, 128_256), 8192, causal=False)
            for name in ("llama3_8b_dense_ct", "llama3_8b_e8t2")
        )
        tokens *= dense / moe
    assert tokens == pytest.approx(27e9, rel=2e-4)
    capacities = {"capacity_1": 1.0, "capacity_2": 2.0, "dropless": None}
    if not path.stem.startswith("dense"):
        config, spec = recipe.model.config, recipe_spec(recipe)
        assert config.moe_expert_capacity_factor == capacities.get(path.stem, 4.0)
        assert config.moe_pad_expert_input_to_capacity is (path.stem == "capacity_1")
        assert spec.router_order == ("softmax_topk" if "router" in path.stem else "topk_softmax")
        assert spec.down_scale == (4.0 if path.stem == "router_st_scaled" else 1.0)


def test_all_ablations_of_the_paper_exist() -> None:
    arms = {"capacity_1", "capacity_2", "capacity_4", "dropless", "router_st", "dense_ct"}
    assert {path.stem for path in ABLATIONS} >= arms


@pytest.mark.parametrize("name", GOLDEN)
def test_recipe_equals_its_golden_file(name: str) -> None:
    """After an intended change, run `python -m tests.golden` and read the difference."""
    assert text_of(name) == golden_path(name).read_text(encoding="utf-8")


def test_pairs_have_the_numbers_of_the_recipes() -> None:
    """The tests of Bridge's recipes compare with these numbers, because their environment has no NeMo."""
    assert pairs_text() == PAIRS.read_text(encoding="utf-8")


@pytest.mark.parametrize("base", [LLAMA, "llama31_8b", "llama3_70b", "qwen3_8b"])
def test_recipe_builds_without_gpu(recipes: Any, base: str) -> None:
    """Build everything except the trainer's devices. Megatron's own checks accept the model, also in FP8."""
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    fast = {"performance_mode": True, "fp8_recipe": "blockwise"}
    for name, arguments in ((f"{base}_e8t2", fast), (f"{base}_dense_ct", {})):
        recipe = getattr(recipes, name).pretrain_recipe(**arguments)
        recipe.trainer.accelerator, recipe.trainer.devices, recipe.trainer.num_nodes = "cpu", 1, 1
        config = fdl.build(recipe.model.config)
        assert bool(config.num_moe_experts) is name.endswith("e8t2")
        assert getattr(config, "scale_factor", None) == (8.0 if base == "llama31_8b" else None)
        assert config.seq_length == recipe.data.seq_length == 8192
        fdl.build(recipe.trainer)
        fdl.build(recipe.optim)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_on_a_data_folder(recipes: Any, name: str) -> None:
    """A data folder does not change the recipe's sizes. The dense baseline reads the same data in the same order."""
    from nemo_upcycle.data.blend_module import blend_data
    from nemo_upcycle.trainers.nemo.checks import check_recipe

    module = getattr(recipes, name)
    recipe, usual = module.pretrain_recipe(data="data/mine"), module.pretrain_recipe()
    assert recipe.data.__fn_or_cls__ is blend_data
    assert (recipe.data.folder, recipe.data.dense) == ("data/mine", recipe.resume.restore_config.path)
    for size in ("seq_length", "micro_batch_size", "global_batch_size", "num_workers"):
        assert getattr(recipe.data, size) == getattr(usual.data, size)
    check_recipe(recipe)
    baseline = getattr(recipes, name.replace("_e8t2", "_dense_ct"))
    assert baseline.pretrain_recipe(data="data/mine").data == recipe.data
    recipe.data = usual.data
    assert recipe == usual
