"""A layout that does not fit is refused with the rule and the valid values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.training.layout import check_layout


CONFIG = {
    "num_layers": 32,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
}
PAPER = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 4,
    "virtual_pipeline_model_parallel_size": 8,
    "expert_model_parallel_size": 8,
    "expert_tensor_parallel_size": 1,
}


def _check(strategy: dict, config: dict | None = None, ranks: int = 512) -> None:
    check_layout(SimpleNamespace(**(PAPER | strategy)), SimpleNamespace(**(CONFIG | (config or {}))), ranks)


def test_the_papers_layout_fits() -> None:
    _check({})


@pytest.mark.parametrize(
    ("strategy", "config", "ranks", "words"),
    [
        ({"expert_model_parallel_size": 6}, {}, 512, ["expert parallelism", "got 6", "1, 2, 4, 8"]),
        ({"tensor_model_parallel_size": 3}, {}, 512, ["tensor parallelism", "got 3", "key-value heads (8)"]),
        ({"virtual_pipeline_model_parallel_size": 3}, {}, 512, ["pipeline stages", "got 12", "num_layers (32)"]),
        ({}, {"moe_router_topk": 9}, 512, ["top_k", "got 9", "1 to num_moe_experts (8)"]),
        ({}, {"num_moe_experts": None}, 512, ["expert parallelism", "1 for a dense model"]),
        ({"expert_model_parallel_size": 1}, {}, 512, ["expert-tensor parallelism", "got 1", "expected 2", "unsummed"]),
        ({}, {}, 12, ["ranks", "got 12", "multiple of 8"]),
        ({}, {}, 8, ["ranks", "got 8", "multiple of 32", "expert-tensor"]),
    ],
)
def test_what_does_not_fit_is_named(strategy: dict, config: dict, ranks: int, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        _check(strategy, config, ranks)
    for word in words:
        assert word in str(caught.value)
