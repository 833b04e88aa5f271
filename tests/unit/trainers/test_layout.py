"""A layout that does not fit is refused with the rule, the nearest good value and the setting."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.recipes import llama3_8b_e8t2
from nemo_upcycle.trainers.layout import check_layout


DENSE_RANKS = "tensor_model_parallel_size x context_parallel_size x pipeline_model_parallel_size"
EXPERT_RANKS = "expert_tensor_parallel_size x expert_model_parallel_size x pipeline_model_parallel_size"


@pytest.mark.parametrize(
    ("changes", "ranks", "field", "words"),
    [
        ({"expert_model_parallel_size": 6}, 512, "expert_model_parallel_size", "1, 2, 4, 8"),
        ({"virtual_pipeline_model_parallel_size": 3}, 512, "virtual_pipeline_model_parallel_size", "parallel_size=2"),
        ({"expert_model_parallel_size": 1}, 512, "expert_tensor_parallel_size", "expert_model_parallel_size is 1"),
        ({}, 12, DENSE_RANKS, "a divisor of the GPUs (12). Set trainer.num_nodes x devices=32"),
        ({}, 8, EXPERT_RANKS, "a divisor of the GPUs (8)"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_by_name(
    changes: dict[str, Any], ranks: int, field: str, words: str
) -> None:
    recipe = llama3_8b_e8t2.pretrain_recipe()
    for name, value in changes.items():
        setattr(recipe.trainer.strategy, name, value)
    with pytest.raises(SpecError) as caught:
        check_layout(recipe.trainer.strategy, recipe.model.config, recipe.data, ranks)
    assert caught.value.field == f"trainer.strategy.{field}"
    assert words in str(caught.value)


def test_what_fp8_cannot_multiply_is_refused() -> None:
    """A rank's number of tokens, and the capacity to which the router pads an expert, must be multiples of 16."""
    from nemo_upcycle.trainers.nemo.checks import check_recipe

    recipe = llama3_8b_e8t2.pretrain_recipe(fp8_recipe="current")
    check_recipe(recipe)
    recipe.data.seq_length = recipe.model.config.seq_length = 8184
    with pytest.raises(SpecError, match=r"data\.seq_length is 8184; expected a multiple of 16 tokens"):
        check_recipe(recipe)
    recipe = llama3_8b_e8t2.pretrain_recipe(fp8_recipe="current", performance_mode=True)
    check_recipe(recipe)
    recipe.model.config.moe_router_padding_for_fp8 = True
    with pytest.raises(SpecError, match=r"model\.config\.moe_router_padding_for_fp8 is True; expected False"):
        check_recipe(recipe)


@pytest.mark.parametrize("place", ["trainer.plugins", "model.config"])
def test_the_planner_is_told_of_nvfp4_as_of_fp8(place: str) -> None:
    from nemo_upcycle.trainers.nemo.checks import precision_name

    recipe = llama3_8b_e8t2.pretrain_recipe()
    assert precision_name(recipe, "bf16-mixed") == "bf16"
    owner = recipe.trainer.plugins if place == "trainer.plugins" else recipe.model.config
    owner.fp4 = "e2m1"
    assert precision_name(recipe, "bf16-mixed") == "nvfp4"
