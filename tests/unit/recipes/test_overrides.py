"""Arguments that override single settings of the H100 recipes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from tests.tiers import every_value


#: The paper's model, and a model whose fast run has another layout.
BASES = ("llama3_8b", "llama3_70b")


def test_current_scaling_has_two_names(recipes: Any) -> None:
    one, other = (recipes.llama3_8b_e8t2.pretrain_recipe(fp8_recipe=name) for name in ("current", "tensorwise"))
    assert one == other


OVERRIDES = {
    "capacity_factor": (2.0, "model.config.moe_expert_capacity_factor", 2.0),
    "router_order": ("softmax_topk", "model.config.moe_router_pre_softmax", True),
    "scale_output": (False, "resume.restore_config.spec.output_scale", "none"),
    "dispatcher": ("deepep", "model.config.moe_token_dispatcher_type", "flex"),
    "recompute_moe_steps": (0, "model.config.recompute_granularity", None),
    "tensor_parallelism": (4, "trainer.strategy.tensor_model_parallel_size", 4),
    "pipeline_parallelism": (2, "trainer.strategy.pipeline_model_parallel_size", 2),
    "virtual_pipeline_parallelism": (1, "trainer.strategy.virtual_pipeline_model_parallel_size", None),
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
    """NeMo-Run parses the command line by the signature, and users read the docstring."""
    from nemo_upcycle.trainers.recipe_arguments import adjust

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


def test_overlap_and_recomputation_can_be_turned_off(recipes: Any) -> None:
    def callbacks(**arguments: Any) -> set[str]:
        recipe = recipes.llama3_8b_e8t2.pretrain_recipe(**arguments)
        return {item.__fn_or_cls__.__name__ for item in recipe.trainer.callbacks}

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
        (
            {"pad_to_capacity": True, "capacity_factor": 0.0},
            "capacity_factor is None; expected a number, because experts are padded",
        ),
        ({"performance_mode": True, "dispatcher": "deepep"}, "deepep cannot pad experts"),
    ],
)
def test_refuses_overrides_that_do_not_fit(recipes: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        recipes.llama3_8b_e8t2.pretrain_recipe(**arguments)
