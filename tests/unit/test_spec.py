"""`UpcycleSpec`: refuses what cannot work, and knows when it is exact."""

from __future__ import annotations

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.spec import without_defaults
from nemo_upcycle.utils.validation import check_capacity


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 9}, ["top_k", "9", "1 to 8 (num_experts)"]),
        ({"top_k": 0}, ["top_k", "0"]),
        ({"num_experts": 1}, ["num_experts: got 1, expected a whole number, 2 to 2048"]),
        ({"num_experts": 10**9}, ["num_experts: got 1000000000, expected a whole number, 2 to 2048"]),
        ({"granularity": 16}, ["granularity: got 16, expected a whole number, 1 to 8 (num_experts)"]),
        ({"top_k": 1}, ["top_k: got 1, expected 2 or more", "set top_k=2, or of a dense parent"]),
        ({"num_experts": 8.0}, ["num_experts", "8.0"]),
        ({"method": "copi"}, ["copi", "Did you mean 'copy'?"]),
        ({"router_init": "norml"}, ["Did you mean 'normal'?"]),
        ({"router_init": ["normal"]}, ["router_init", "Valid: normal, prompts, uniform, zero"]),
        ({"router_order": "softmax"}, ["softmax_topk"]),
        ({"expert_split": "coactivation"}, ["expert_split: got coactivation", "omit expert_split, or go on with the"]),
        ({"router_init": "kmeans"}, ["router_init: got kmeans", "gained nothing and was removed"]),
        ({"calibration": "file"}, ["calibration: got file, expected none: nothing is read from it"]),
        ({"router_init": "prompts", "router_spread": -1.0}, ["router_spread: got -1.0"]),
        ({"router_init": "zero", "router_prompts": "file"}, ["router_prompts: got file, expected none with router"]),
        ({"router_init": "prompts"}, ["router_prompts: got none", "name it, or the calibration that was made of it"]),
        (
            {"router_score": "sigmoid", "router_order": "softmax_topk"},
            ["router_order: got softmax_topk, expected topk_softmax with router_score=sigmoid"],
        ),
        ({"router_std": -1.0}, ["router_std", "-1.0"]),
        ({"router_std": float("nan")}, ["router_std", "nan"]),
        ({"router_std": float("inf")}, ["router_std: got inf, expected a number, 0 to 1000"]),
        ({"noise_std": float("inf")}, ["noise_std: got inf"]),
        ({"method": "noise", "noise_std": float("nan")}, ["noise_std: got nan"]),
        ({"drop_ratio": float("nan")}, ["drop_ratio: got nan, expected a number, 0 to 1"]),
        ({"routed_scaling_factor": float("inf")}, ["routed_scaling_factor: got inf"]),
        ({"routed_scaling_factor": float("nan")}, ["routed_scaling_factor: got nan"]),
        ({"routed_scaling_factor": 0.0}, ["routed_scaling_factor: got 0.0, expected a number, 0.001 to 1000"]),
        ({"router_std": "wide"}, ["router_std: got wide"]),
        ({"noise_std": 10**400}, ["noise_std: got 1000", "0 to 1000"]),
        ({"moe_layers": None}, ["moe_layers: got None, expected layer numbers"]),
        ({"moe_layers": 5}, ["moe_layers: got 5, expected layer numbers"]),
        ({"moe_layers": [True, False]}, ["moe_layers: got [True, False], expected layer numbers"]),
    ],
)
def test_a_bad_value_is_refused_with_the_fix(changes: dict, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        UpcycleSpec(**changes)
    for word in words:
        assert word in str(caught.value)


def test_a_removed_field_at_its_default_is_read_and_not_written() -> None:
    spec = UpcycleSpec(**{"num_experts": 4, "expert_split": "consecutive"})
    assert spec == UpcycleSpec(num_experts=4)
    assert "expert_split" not in spec.to_dict()
    assert without_defaults({"expert_split": "consecutive"}) == {}


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


def test_a_router_from_data_is_exact_as_a_drawn_one_is() -> None:
    prompts = {"router_init": "prompts", "calibration": "file"}
    assert UpcycleSpec(**prompts).is_exact
    assert not UpcycleSpec(**prompts, router_order="softmax_topk").is_exact
    assert UpcycleSpec(**prompts, router_order="softmax_topk", router_spread=0.0).is_exact


@pytest.mark.parametrize("factor", [4.5, float("inf"), float("nan")])
def test_a_capacity_beyond_every_token_is_refused(factor: float) -> None:
    with pytest.raises(SpecError) as caught:
        check_capacity(factor, pad=False, num_experts=8, top_k=2)
    assert (caught.value.field, caught.value.fix) == ("capacity_factor", "set <capacity_factor>=4")
