"""Biases that balance the experts move alike on every layout; see `router_step.py`."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from tests.distributed.ranks import run_ranks
from tests.distributed.router_step import CELLS, IS_015, LAYOUTS, QUICK, SPEC, by_layer, size, take_step
from tests.tiers import quick


RATE = 0.01
#: Balancing -> spec, settings, what the receipt says.
CASES: dict[str, tuple[UpcycleSpec, dict[str, Any], dict[str, float]]] = {
    "signs": (
        UpcycleSpec(num_experts=4, top_k=2, router_std=0.5, router_score="sigmoid"),
        {
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": RATE,
            "moe_router_load_balancing_type": "none",
        },
        {"moe_router_bias_update_rate": RATE},
    ),
    "quantiles": (
        SPEC,
        {"moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.0},
        {"moe_router_quantile_balancing_ema": 0.0},
    ),
}
if IS_015:
    del CASES["quantiles"]


def _steps(layout: str, micro_batches: int) -> dict[str, dict[str, Any]]:
    return {case: take_step(layout, settings, micro_batches, spec=spec) for case, (spec, settings, _) in CASES.items()}


class Steps:
    """The steps of one rank and of four."""

    def __init__(self) -> None:
        (self.alone,) = run_ranks(_steps, 1, "alone", CELLS)
        self._found: dict[str, list[Any]] = {}

    def ranks(self, layout: str, case: str) -> list[dict[str, Any]]:
        """Return what each of four ranks finds under a layout."""
        if layout not in self._found:
            self._found[layout] = run_ranks(_steps, 4, layout, CELLS // size(layout, "dp"))
        return [rank[case] for rank in self._found[layout]]


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps()


@pytest.mark.parametrize("layout", quick(LAYOUTS, *QUICK))
@pytest.mark.parametrize("case", CASES)
def test_biases_move_on_every_layout_as_on_one_rank(steps: Steps, layout: str, case: str) -> None:
    got = by_layer(steps.ranks(layout, case), "biases")
    expected = by_layer([steps.alone[case]], "biases")
    assert (got - expected).abs().max() < (1e-5 if "quantile" in case else 1e-6)
    assert (expected != 0).any(dim=1).all()
    if case == "signs":
        assert (((got.abs() - RATE).abs() < 1e-6) | (got == 0)).all()


@pytest.mark.parametrize("layout", quick(LAYOUTS, *QUICK))
@pytest.mark.parametrize("case", CASES)
def test_router_health_shows_how_far_apart_they_are(steps: Steps, layout: str, case: str) -> None:
    biases_LE = by_layer(steps.ranks(layout, case), "biases")
    ranges = (biases_LE.amax(dim=1) - biases_LE.amin(dim=1)).tolist()
    assert steps.ranks(layout, case)[0]["health"]["balancing_bias_range"] == pytest.approx(ranges, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_receipt_says_what_moves_them(steps: Steps, case: str) -> None:
    assert steps.alone[case]["receipt"] == CASES[case][-1]
    assert steps.alone[case]["acting"] == []
