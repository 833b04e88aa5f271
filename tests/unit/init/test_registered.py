"""Checks of every registered init method and router initialisation; new ones are included automatically."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.init.experts import BLOCK, ExpertMatrix
from nemo_upcycle.init.methods import METHODS
from nemo_upcycle.init.rng import block_generator
from nemo_upcycle.init.router import router_weight
from nemo_upcycle.spec import ROUTER_INITS
from tests.unit.online.samples import calibrated


NEURONS, WIDTH, LAYER, EXPERT = 2 * BLOCK + 88, 16, 2, 3
PARTS = ("gate", "up", "down")
DRAWN = [name for name, one in ROUTER_INITS.items() if not one.from_data]


def _network() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {part: torch.randn(NEURONS, WIDTH, generator=generator) * 0.1 for part in PARTS}


def _changed(method: str, part: str, dense_FD: torch.Tensor, cuts: tuple[int, ...] = ()) -> torch.Tensor:
    """Return an expert's matrix made by several ranks; each rank has the neurons between two cuts."""
    spec, bounds = UpcycleSpec(method=method), (0, *cuts, len(dense_FD))
    locals_FD = [dense_FD[start:stop].clone() for start, stop in pairwise(bounds)]
    for start, local_FD in zip(bounds, locals_FD, strict=False):
        METHODS[method].change(ExpertMatrix(LAYER, EXPERT, part, start, local_FD, dense_FD.clone), spec)
    return torch.cat(locals_FD)


def _output(network: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute a gated FFN in float64, [T, D] -> [T, D]."""
    gate_FD, up_FD, down_FD = (network[part].double() for part in PARTS)
    tokens_TD = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (torch.nn.functional.silu(tokens_TD @ gate_FD.T) * (tokens_TD @ up_FD.T)) @ down_FD


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_exact_if_it_says_so(method: str) -> None:
    dense = _network()
    expected = _output(dense)
    found = _output({part: _changed(method, part, matrix_FD) for part, matrix_FD in dense.items()})
    difference = float((found - expected).norm() / expected.norm())
    is_exact = not METHODS[method].inexact_because(UpcycleSpec(method=method))
    assert difference < 1e-6 if is_exact else difference > 1e-4


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, NEURONS - 1), max_size=6), part=st.sampled_from(PARTS))
def test_a_method_gives_the_same_bits_on_every_layout(method: str, cuts: set[int], part: str) -> None:
    for dense_FD in (_network()[part], _network()[part].bfloat16()):
        whole_FD = _changed(method, part, dense_FD)
        torch.rand(3)  # methods must not depend on torch's own generator
        assert torch.equal(_changed(method, part, dense_FD, tuple(sorted(cuts))), whole_FD)


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if one.strength])
def test_a_methods_strength_of_zero_changes_nothing(method: str) -> None:
    spec, dense_FD = UpcycleSpec(method=method, **{METHODS[method].strength: 0.0}), _network()["up"]
    local_FD = dense_FD.clone()
    METHODS[method].change(ExpertMatrix(LAYER, EXPERT, "up", 0, local_FD, dense_FD.clone), spec)
    assert torch.equal(local_FD, dense_FD)
    assert METHODS[method].inexact_because(spec) == ""


@pytest.mark.parametrize("name", DRAWN)
def test_a_routers_row_depends_on_its_own_generator_alone(name: str) -> None:
    def drawn(copies: range) -> torch.Tensor:
        generators = [block_generator(1, "router", LAYER, copy) for copy in copies]
        return ROUTER_INITS[name].rows(UpcycleSpec(router_init=name), LAYER, WIDTH, generators)

    rows_CD = drawn(range(5))
    assert rows_CD.dtype is torch.float64
    assert rows_CD.shape == (5, WIDTH)
    assert torch.equal(rows_CD[3:], drawn(range(3, 5)))


@pytest.mark.parametrize("name", ROUTER_INITS)
def test_a_router_is_zero_if_it_says_so(name: str, tmp_path: Path, dense: Path) -> None:
    if ROUTER_INITS[name].from_data:
        spec = calibrated(dense, tmp_path / "calibration.safetensors", num_experts=4, top_k=2)
    else:
        spec = UpcycleSpec(num_experts=4, top_k=2, router_init=name)
    weights_ED = [router_weight(spec, 0, 64) for _ in range(2)]
    assert torch.equal(*weights_ED)
    assert ROUTER_INITS[name].is_zero(spec) is not bool(weights_ED[0].any())
