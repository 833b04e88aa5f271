"""Factors and coefficients at every step, and the same settings read from NeMo's command line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.schedules import Anneal, LearningRateFactors, part_of, schedules_of


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("module.module.decoder.layers.0.mlp.router.weight", "router"),
        ("module.module.decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight", "experts"),
        ("mtp.layers.0.transformer_layer.mlp.experts.linear_fc1.weight0", "experts"),
        ("module.decoder.layers.3.mlp.shared_experts.linear_fc1.weight", "rest"),
        ("module.decoder.layers.3.mlp.linear_fc1.weight", "rest"),
        ("embedding.word_embeddings.weight", "rest"),
    ],
)
def test_part_of_follows_the_parameter_name(name: str, part: str) -> None:
    assert part_of(name) == part


@pytest.mark.parametrize(
    ("freezes", "during"),
    [("experts", {"router": 4.0, "experts": 0.0, "rest": 1.0}), ("all", {"router": 4.0, "experts": 0.0, "rest": 0.0})],
)
def test_factors_change_when_the_warmup_ends(freezes: str, during: dict[str, float]) -> None:
    factors = LearningRateFactors(router=4.0, experts=0.5, warmup_steps=3, freezes=freezes)
    after = {"router": 4.0, "experts": 0.5, "rest": 1.0}
    for step, expected in ((0, during), (2, during), (3, after), (1000, after)):
        assert {part: factors.of(part, step) for part in expected} == expected


def test_only_the_default_is_neutral() -> None:
    assert LearningRateFactors().is_neutral
    for changes in ({"router": 2.0}, {"experts": 0.5}, {"warmup_steps": 1}):
        assert not LearningRateFactors(**changes).is_neutral


@pytest.mark.parametrize(("start", "end"), [(0.01, 0.001), (0.0, 0.02)])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_an_anneal_goes_from_start_to_end_and_stays(start: float, end: float, shape: str) -> None:
    anneal = Anneal(start=start, end=end, steps=8, shape=shape)
    values = [anneal.at(step) for step in range(12)]
    assert values[0] == start
    assert values[8:] == [end] * 4
    assert values[4] == pytest.approx((start + end) / 2)
    assert values == sorted(values, reverse=start > end)
    share = 2 / 8 if shape == "linear" else (1 - math.cos(math.pi / 4)) / 2
    assert values[2] == pytest.approx(start + (end - start) * share)


def test_an_anneal_without_steps_keeps_its_start() -> None:
    assert {Anneal(start=0.01).at(step) for step in (0, 1, 10**6)} == {0.01}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"router_lr_mult": "4"}, "router_lr_mult"),
        ({"expert_lr_mult": math.nan}, "expert_lr_mult"),
        ({"router_warmup_steps": 1.5}, "router_warmup_steps"),
        ({"router_warmup_freezes": "expert"}, "router_warmup_freezes"),
        ({"aux_loss_end": 0.001}, "aux_loss_steps"),
        ({"aux_loss_end": -0.1, "aux_loss_steps": 1}, "aux_loss_end"),
        ({"aux_loss_shape": "cosin"}, "aux_loss_shape"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as raised:
        schedules_of(**settings)
    assert raised.value.field == field
