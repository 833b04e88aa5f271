"""`UpcycleSpec` refuses values that cannot work, and knows when it is exact."""

from __future__ import annotations

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.utils.validation import check_capacity


PROMPTS = {"router_init": "prompts"}
SIGMOID_FIRST = {"router_score": "sigmoid", "router_order": "softmax_topk"}


@pytest.mark.parametrize(
    ("changes", "field", "got"),
    [
        ({"top_k": 9}, "top_k", 9),
        ({"top_k": 1}, "top_k", 1),
        ({"num_experts": 1}, "num_experts", 1),
        ({"num_experts": 8.0}, "num_experts", 8.0),
        ({"granularity": 16}, "granularity", 16),
        ({"method": "copi"}, "method", "copi"),
        ({"router_init": "kmeans"}, "router_init", "kmeans"),
        ({"router_order": "softmax"}, "router_order", "softmax"),
        ({"calibration": "file"}, "calibration", "is read only with <router_init>=prompts"),
        (PROMPTS | {"router_spread": -1.0}, "router_spread", -1.0),
        (
            {"router_init": "zero", "router_prompts": "file"},
            "router_prompts",
            "is read only with <router_init>=prompts",
        ),
        (PROMPTS, "router_prompts", "is missing"),
        (SIGMOID_FIRST, "router_order", "softmax_topk"),
        ({"router_std": float("nan")}, "router_std", "nan"),
        ({"method": "noise", "noise_std": float("nan")}, "noise_std", "nan"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor", 0.0),
        ({"moe_layers": [True, False]}, "moe_layers", [True, False]),
    ],
)
def test_a_bad_value_is_refused_by_its_field(changes: dict, field: str, got: object) -> None:
    with pytest.raises(SpecError) as caught:
        UpcycleSpec(**changes)
    assert (caught.value.field, str(caught.value.got)) == (field, str(got))


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [("all", [1, 1, 1, 1]), ("every-2", [1, 0, 1, 0]), ("first-1-dense", [0, 1, 1, 1]), ((0, 3), [1, 0, 0, 1])],
)
def test_words_and_numbers_name_the_layers_with_experts(layers: str | tuple[int, ...], pattern: list[int]) -> None:
    assert list(UpcycleSpec(moe_layers=layers).moe_pattern(4)) == pattern


def test_the_default_is_the_papers() -> None:
    spec = UpcycleSpec()
    assert (spec.num_experts, spec.top_k, spec.method, spec.router_order) == (8, 2, "copy", "topk_softmax")
    assert spec.is_exact
    assert spec.down_scale == 1.0


@pytest.mark.parametrize(
    ("changes", "exact", "scale"),
    [
        ({"router_order": "softmax_topk", "router_init": "zero"}, True, 4.0),
        ({"router_order": "softmax_topk"}, False, 4.0),
        ({"router_order": "softmax_topk", "output_scale": "none"}, False, 1.0),
        ({"router_order": "softmax_topk", "top_k": 8}, True, 1.0),
    ],
)
def test_softmax_before_top_k(changes: dict, exact: bool, scale: float) -> None:
    spec = UpcycleSpec(**changes)
    assert (spec.is_exact, spec.down_scale) == (exact, scale)


def test_a_router_from_data_is_exact() -> None:
    prompts = {"router_init": "prompts", "calibration": "file"}
    assert UpcycleSpec(**prompts).is_exact
    assert not UpcycleSpec(**prompts, router_order="softmax_topk").is_exact
    assert UpcycleSpec(**prompts, router_order="softmax_topk", router_spread=0.0).is_exact


@pytest.mark.parametrize("factor", [4.5, float("inf"), float("nan")])
def test_a_capacity_beyond_every_token_is_refused(factor: float) -> None:
    with pytest.raises(SpecError) as caught:
        check_capacity(factor, pad=False, num_experts=8, top_k=2)
    assert (caught.value.field, caught.value.fix) == ("capacity_factor", "set <capacity_factor>=4")
