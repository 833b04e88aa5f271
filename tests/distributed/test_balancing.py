"""Load balancing acts on every layout as on one rank: losses through gradients, biases through their updates.

See `router_step.py`. These tests run with Megatron-Core 0.15 and with Bridge's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from tests.distributed.ranks import run_ranks
from tests.distributed.router_step import CELLS, IS_015, by_layer, take_step
from tests.tiers import quick


pytestmark = pytest.mark.full
SPEC = UpcycleSpec(num_experts=4, top_k=2, router_std=0.5)
#: Layouts of four ranks.
LAYOUTS: dict[str, dict[str, int]] = {
    "dp4": {},
    "tp2 dp2, ep2": {"tp": 2, "ep": 2},
    "cp2 dp2, ep4": {"cp": 2, "ep": 4},
    "cp4": {"cp": 4},
    "tp2 cp2": {"tp": 2, "cp": 2},
    "pp2 cp2": {"pp": 2, "cp": 2},
    "pp2 vp2 cp2": {"pp": 2, "vp": 2, "cp": 2},
}
KIND, COEFFICIENT = "moe_router_load_balancing_type", "moe_aux_loss_coeff"
_EVERY_LOSS = {KIND: ["aux_loss", "seq_aux_loss"], COEFFICIENT: [0.01, 0.03], "moe_z_loss_coeff": 0.02}
#: A loss over the global batch. A single rank therefore uses fewer, larger micro-batches. Each contains the
#: micro-batches of all data-parallel ranks.
_GLOBAL = {KIND: "global_aux_loss", COEFFICIENT: 0.01}
LOSSES: dict[str, dict[str, Any]] = {
    "every loss": _EVERY_LOSS,
    "per token": {**_EVERY_LOSS, "calculate_per_token_loss": True},
    "global": _GLOBAL,
    "global per token": {**_GLOBAL, "calculate_per_token_loss": True},
}
SET = {"every loss": {"aux_loss": 0.01, "seq_aux_loss": 0.03, "z_loss": 0.02}, "global": {"global_aux_loss": 0.01}}
RATE = 0.01
BY_SIGNS = {"moe_router_bias_update_rate": RATE}
#: Way to balance with biases -> spec, settings, and the receipt's entry about the biases.
BIASES: dict[str, tuple[UpcycleSpec, dict[str, Any], dict[str, float]]] = {
    "signs": (
        replace(SPEC, router_score="sigmoid"),
        {"moe_router_enable_expert_bias": True, KIND: "none"} | BY_SIGNS,
        BY_SIGNS,
    ),
    "quantiles": (SPEC, {KIND: "quantile_balancing", COEFFICIENT: 0.0}, {"moe_router_quantile_balancing_ema": 0.0}),
}
if IS_015:
    del BIASES["quantiles"]
Steps = dict[Any, dict[str, Any]]
Ranks = Callable[[str], list[Steps]]


def _size(layout: str, axis: str) -> int:
    sizes = LAYOUTS[layout]
    if axis == "dp":
        return 4 // (sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("pp", 1))
    return sizes.get(axis, 1)


def _kind(case: str) -> str:
    return "global" if case.startswith("global") else "every loss"


def _corrected(_: Any, config: Any) -> Any:
    from nemo_upcycle.trainers.aux_loss import correct_losses

    return correct_losses(config)


def _alone() -> Steps:
    """Return the steps of one rank, for each case and number of micro-batches."""
    found: Steps = {
        (case, micro_batches): take_step({}, settings, SPEC, micro_batches)
        for micro_batches in (1, 2, 4)
        for case, settings in LOSSES.items()
    }
    for case, (spec, settings, _) in BIASES.items():
        found[case] = take_step({}, settings, spec, CELLS, prepare=_corrected)
    return found


def _together(layout: str) -> Steps:
    """Return the step of each case on one of four ranks."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter

    megatrons, asked = MoEAuxLossAutoScaler.set_loss_scale, TopKRouter.get_aux_loss_coeff
    sizes, found = LAYOUTS[layout], Steps()
    for case, settings in LOSSES.items():
        MoEAuxLossAutoScaler.set_loss_scale, TopKRouter.get_aux_loss_coeff = staticmethod(megatrons), asked
        found[case] = take_step(sizes, settings, SPEC, prepare=_corrected)
    for case, (spec, settings, _) in BIASES.items():
        found[case] = take_step(sizes, settings, spec, prepare=_corrected)
    return found


@pytest.fixture(scope="module")
def alone() -> Steps:
    return run_ranks(_alone, 1)[0]


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return cache(lambda layout: run_ranks(_together, 4, layout))


def _of_one_rank(alone: Steps, layout: str, case: str) -> dict[str, Any]:
    """Return the result of a single rank for the same cells that the layout computes."""
    return alone[case, CELLS // _size(layout, "dp") if _kind(case) == "global" else CELLS]


EVERY_LAYOUT = pytest.mark.parametrize("layout", quick(LAYOUTS, "tp2 cp2", "tp2 dp2, ep2"))


@EVERY_LAYOUT
@pytest.mark.parametrize("case", LOSSES)
def test_coefficients_act_as_set_on_every_layout(alone: Steps, ranks: Ranks, layout: str, case: str) -> None:
    """Megatron divides losses by layout sizes. This package undoes the division, and the receipt names it."""
    found, of_one_rank = [rank[case] for rank in ranks(layout)], _of_one_rank(alone, layout, case)
    gradients, wanted = by_layer(found, "gradients"), by_layer([of_one_rank], "gradients")
    assert float((gradients - wanted).norm() / wanted.norm()) < 2e-5
    divided_by = _size(layout, "dp") if _kind(case) == "global" else 1
    if IS_015:
        divided_by *= _size(layout, "cp") * (_size(layout, "tp") if case.endswith("per token") else 1)
    for rank in found:
        acting = {loss.name: (loss.coefficient, loss.acting) for loss in rank["prepared"]}
        assert acting == {name: (value, value) for name, value in SET[_kind(case)].items()}
    assert (f"divides it by {divided_by} " in found[0]["prepared"][0].why) == (divided_by > 1)
    got, expected = found[0]["health"], of_one_rank["health"]
    for name in (loss.replace("aux_loss", "load_balancing_loss") for loss in SET[_kind(case)]):
        assert got[name] == pytest.approx(expected[name], rel=1e-4)
        assert all(value > 0.5 for value in got[name])
    assert got["load_max"] == pytest.approx(expected["load_max"], abs=1e-6)


@EVERY_LAYOUT
@pytest.mark.parametrize("case", BIASES)
def test_biases_move_on_every_layout_as_on_one_rank(alone: Steps, ranks: Ranks, layout: str, case: str) -> None:
    found = [rank[case] for rank in ranks(layout)]
    biases_LE, expected_LE = by_layer(found, "biases"), by_layer([alone[case]], "biases")
    assert (biases_LE - expected_LE).abs().max() < (1e-5 if "quantile" in case else 1e-6)
    assert (expected_LE != 0).any(dim=1).all()
    if case == "signs":
        assert (((biases_LE.abs() - RATE).abs() < 1e-6) | (biases_LE == 0)).all()
    ranges = (biases_LE.amax(dim=1) - biases_LE.amin(dim=1)).tolist()
    assert found[0]["health"]["balancing_bias_range"] == pytest.approx(ranges, abs=1e-6)
    assert (alone[case]["receipt"], alone[case]["prepared"]) == (BIASES[case][-1], [])


@pytest.mark.skipif(find_spec("nemo") is None, reason="it trains in NeMo")
def test_a_recipe_on_two_ranks_trains_as_on_one(tmp_path: Path) -> None:
    """With losses per token, Megatron divides by the TP size. CP is not tested, because this attention lacks it."""
    from tests.functional.runs import Runs

    runs, lines, receipts = Runs(tmp_path), {}, {}
    settings = {
        "model.config.calculate_per_token_loss": True,
        "model.config.moe_aux_loss_coeff": 5.0,  # outweighs the other losses
        "trainer.strategy.ddp.average_in_collective": False,  # because Megatron counts tokens instead
    }
    for ranks in (1, 2):
        lines[ranks] = runs.train(f"{ranks}", ranks, steps=3, tp=ranks, settings=settings)
        (receipts[ranks],) = json.loads((tmp_path / f"{ranks}/receipt.json").read_text())["auxiliary_losses"]
    assert len(lines[1]) == 3
    for got, expected in zip(lines[2], lines[1], strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert receipts[1] == {"name": "aux_loss", "coefficient": 5.0, "acting": 5.0, "why": "as set"}
    assert (receipts[2]["coefficient"], receipts[2]["acting"]) == (5.0, 5.0)
    assert "divides it by 2 on this layout" in receipts[2]["why"]
