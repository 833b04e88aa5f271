"""The arguments that override single settings of the H100 recipes, and a recipe that is written with them."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from tests.tiers import every_value


#: Of the paper's model, and of one whose fast run has another layout.
BASES = ("llama3_8b", "llama3_70b")


@pytest.mark.parametrize(("base", "name"), every_value(BASES, ("delayed", "tensorwise", "current", "blockwise")))
def test_fp8_run_names_its_recipe_everywhere(recipes: Any, base: str, name: str) -> None:
    recipe = getattr(recipes, f"{base}_e8t2").pretrain_recipe(fp8_recipe=name)
    config, precision = recipe.model.config, recipe.trainer.plugins
    assert precision.fp8_recipe == config.fp8_recipe == {"current": "tensorwise"}.get(name, name)
    assert precision.fp8 == config.fp8 == "hybrid"
    assert precision.fp8_param_gather is False
    assert config.moe_router_padding_for_fp8 is True
    assert precision.grad_reduce_in_fp32 is True


OVERRIDES = {
    "capacity_factor": (2.0, "model.config.moe_expert_capacity_factor", 2.0),
    "router_order": ("softmax_topk", "model.config.moe_router_pre_softmax", True),
    "scale_output": (False, "resume.restore_config.spec.output_scale", "none"),
    "dispatcher": ("deepep", "model.config.moe_token_dispatcher_type", "flex"),
    "recompute_moe_steps": (0, "model.config.recompute_granularity", None),
    "tensor_parallelism": (4, "trainer.strategy.tensor_model_parallel_size", 4),
    "pipeline_parallelism": (2, "trainer.strategy.pipeline_model_parallel_size", 2),
    "virtual_pipeline_parallelism": (1, "trainer.strategy.virtual_pipeline_model_parallel_size", None),
    "context_parallelism": (4, "trainer.strategy.context_parallel_size", 4),
    "expert_parallelism": (4, "trainer.strategy.expert_model_parallel_size", 4),
    "expert_tensor_parallelism": (2, "trainer.strategy.expert_tensor_parallel_size", 2),
}


@pytest.mark.parametrize(("base", "override"), every_value(BASES, OVERRIDES))
def test_override_changes_its_setting_in_plain_and_fast_run(recipes: Any, base: str, override: str) -> None:
    value, path, expected = OVERRIDES[override]
    fast = {"pad_to_capacity": False} if override == "dispatcher" else {}
    for arguments in ({}, {"performance_mode": True, **fast}):
        setting: Any = getattr(recipes, f"{base}_e8t2").pretrain_recipe(**arguments, **{override: value})
        for name in path.split("."):
            setting = getattr(setting, name)
        assert setting == expected


def test_recipe_shows_every_override_in_signature_and_docstring(recipes: Any) -> None:
    """NeMo-Run parses the command line by the first; its users read the second."""
    from nemo_upcycle.recipes.h100_arguments import adjust

    recipe = recipes.llama3_8b_e8t2.pretrain_recipe
    signature = inspect.signature(recipe)
    overrides = list(inspect.signature(adjust).parameters.values())[1:]
    assert len(overrides) == 14
    names = ["dir", "name", "num_nodes", "num_gpus_per_node", "performance_mode", "dense", "data"]
    assert list(signature.parameters) == [*names, *(override.name for override in overrides), "fn"]
    for override in overrides:
        assert signature.parameters[override.name].annotation == override.annotation
        assert recipe.__doc__.count(f"\n    {override.name} (") == 1
    with pytest.raises(TypeError, match="fp8_recip"):
        recipe(fp8_recip="blockwise")


#: What someone writes for another model: NeMo's recipe of it, the spec, the layout.
NEW_RECIPE = """
import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.gpt.model.llama import Llama32Config1B, LlamaModel
from nemo.collections.llm.recipes import llama32_1b

from nemo_upcycle.recipes.common import moe_settings
from nemo_upcycle.recipes.h100 import dense_baseline, fast_run, moe_trainer, upcycled_recipe
from nemo_upcycle.recipes.h100_arguments import moe_kernels
from nemo_upcycle.spec import UpcycleSpec

NAME = "llama32_1b_e16t4"
DENSE = "hf://meta-llama/Llama-3.2-1B"
SPEC = UpcycleSpec(num_experts=16, top_k=4)
trainer = moe_trainer(
    llama32_1b.trainer, tensor_parallelism=1, pipeline_parallelism=2, virtual_pipeline_parallelism=None
)
baseline = dense_baseline("llama32_1b_e16t4_dense", llama32_1b, DENSE)


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    config = run.Config(Llama32Config1B, seq_length=8192, **moe_settings(SPEC), **moe_kernels(capacity_factor=None))
    return run.Config(LlamaModel, config=config)


def fast(recipe: run.Partial) -> run.Partial:
    return fast_run(recipe, tensor_parallelism=1, context_parallelism=1)


pretrain_recipe = upcycled_recipe(NAME, llama32_1b, model, trainer, DENSE, SPEC, fast)
"""


def test_new_recipe_takes_under_30_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes: Any) -> None:
    from nemo.collections.llm.api import pretrain
    from nemo_run.cli.lazy import LazyEntrypoint

    from nemo_upcycle.trainers.nemo.checks import check_recipe, ranks_of
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe, spec_of

    assert sum(bool(line.strip()) for line in NEW_RECIPE.splitlines()) < 30
    (tmp_path / "made_up_recipe.py").write_text(NEW_RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("made_up_recipe")
    factory = "llama32_1b_e16t4(fp8_recipe='blockwise', capacity_factor=2.0, num_nodes=2)"
    recipe = LazyEntrypoint(pretrain, factory=factory).resolve()
    check_recipe(recipe)
    config = recipe.model.config
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_expert_capacity_factor) == (16, 4, 2.0)
    assert (config.fp8_recipe, recipe.trainer.plugins.fp8_recipe) == ("blockwise", "blockwise")
    assert recipe.trainer.strategy.expert_model_parallel_size == 8
    assert ranks_of(recipe) == (2, 8)
    assert spec_of(recipe) == UpcycleSpec(num_experts=16, top_k=4)
    assert load_recipe(dump_recipe(recipe)) == recipe
    baseline = LazyEntrypoint(pretrain, factory="llama32_1b_e16t4_dense").resolve()
    assert baseline.resume.restore_config.spec is None
    for name in ("data", "optim"):
        assert getattr(baseline, name).__arguments__.keys() == getattr(recipe, name).__arguments__.keys()
    assert baseline.trainer.max_steps == recipe.trainer.max_steps


def test_overlap_and_recomputation_can_be_turned_off(recipes: Any) -> None:
    def callbacks(**arguments: Any) -> set[str]:
        return {
            item.__fn_or_cls__.__name__
            for item in recipes.llama3_8b_e8t2.pretrain_recipe(**arguments).trainer.callbacks
        }

    both = {"MegatronCommOverlapCallback", "RecomputeFirstSteps"}
    assert callbacks() - callbacks(comm_overlap=False, recompute_moe_steps=0) == both
    assert "RecomputeFirstSteps" not in callbacks(performance_mode=True)
    assert "RecomputeFirstSteps" in callbacks(performance_mode=True, recompute_moe_steps=10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fp8_recipe": "blokwise"}, "Did you mean 'blockwise'"),
        ({"dispatcher": "alltoal"}, "Did you mean 'alltoall'"),
        ({"router_order": "topk"}, "Valid: softmax_topk, topk_softmax"),
        ({"pad_to_capacity": True}, "every expert would compute every token"),
        ({"capacity_factor": 5.0}, "at most num_experts / top_k \\(4\\)"),
        (
            {"pad_to_capacity": True, "capacity_factor": 0.0},
            "capacity_factor: got None, expected a number with padding",
        ),
        ({"performance_mode": True, "dispatcher": "deepep"}, "expected alltoall with pad_to_capacity"),
    ],
)
def test_refuses_overrides_that_do_not_fit(recipes: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        recipes.llama3_8b_e8t2.pretrain_recipe(**arguments)
