"""A layout that does not fit is refused with the rule, the nearest good value and the setting."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.layout import check_layout


def _check(changes: dict[str, Any], ranks: int = 512) -> None:
    """Check the recipe of the paper's run, with some settings changed."""
    from nemo_upcycle.recipes import llama3_8b_e8t2

    recipe = llama3_8b_e8t2.pretrain_recipe()
    for name, value in changes.items():
        owners = (recipe.data, recipe.trainer.strategy, recipe.model.config)
        setattr(next(owner for owner in owners if _has(owner, name)), name, value)
    check_layout(recipe.trainer.strategy, recipe.model.config, recipe.data, ranks)


def _has(config: Any, name: str) -> bool:
    return name in config.__signature_info__.parameters


def test_the_papers_layout_fits() -> None:
    _check({})


def test_uneven_stages_fit_where_megatron_takes_them() -> None:
    sizes = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": None, "num_layers": 30}
    ends = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    _check(sizes | ends)
    with pytest.raises(SpecError, match=r"num_layers \(30\)"):
        _check(sizes)


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({"expert_model_parallel_size": 6}, 512, ["ep: got 6", "1, 2, 4, 8", "strategy.expert_model_parallel_size"]),
        ({"tensor_model_parallel_size": 3}, 512, ["tp: got 3", "key-value heads (8)", "tensor_model_parallel_size"]),
        ({"virtual_pipeline_model_parallel_size": 3}, 512, ["vp: got 3", "a pipeline stage (8)", "set vp=2"]),
        ({"moe_router_topk": 9}, 512, ["top_k: got 9", "1 to num_moe_experts (8)", "moe_router_topk"]),
        ({"num_moe_experts": None}, 512, ["ep: got 8", "1 for a dense model"]),
        (
            {"expert_model_parallel_size": 1},
            512,
            ["etp: got 1", "wrong ranks", "expert_tensor_parallel_size"],
        ),
        (
            {},
            12,
            [
                "tp x cp x pp: got 8",
                "a divisor of the GPUs (12)",
                "set gpus=32",
                "trainer.num_nodes x trainer.devices",
            ],
        ),
        ({}, 8, ["etp x ep x pp: got 32", "a divisor of the GPUs (8)"]),
        ({"global_batch_size": 100}, 512, ["global-batch: got 100", "data.global_batch_size"]),
        ({"global_batch_size": 64}, 512, ["global-batch: got 64", "interleaved stages", "data.global_batch_size"]),
        ({"seq_length": 8191}, 512, ["seq-length: got 8191", "data.seq_length"]),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], ranks: int, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        _check(changes, ranks)
    for word in words:
        assert word in str(caught.value)
