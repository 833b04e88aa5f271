"""For each recipe, count the numbers that the emulation of FP8 loses; expected counts are computed by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_upcycle.cpu import fp8_recipe
from nemo_upcycle.cpu.fp8_losses import Fp8Losses
from nemo_upcycle.cpu.fp8_recipe import GRADIENT, INPUT, RECIPES, Fp8Recipe


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fp8Losses]:
    counted = Fp8Losses()
    monkeypatch.setattr(fp8_recipe, "watcher", counted)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    return counted


def test_losses_are_counted_at_the_earlier_scale(losses: Fp8Losses) -> None:
    numbers = torch.tensor([[0.0, 2.0**-11, 1.0, 448.0, 500.0, -1e6, 2.0**-30, 3.0]])
    Fp8Recipe("delayed").quantize(numbers, INPUT, torch.ones(()))
    found = losses.describe(losses.local())["fp8"]
    assert found["input"] == {"amax": 1e6, "underflow": round(2 / 7, 6), "saturated": round(2 / 7, 6)}
    assert found["gradient"] == {"amax": 0.0, "underflow": 0.0, "saturated": 0.0}
    assert losses.describe(losses.local())["fp8"]["input"]["amax"] == 0.0


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_own_scales_clip_nothing_and_lose_small_numbers(losses: Fp8Losses, recipe: str) -> None:
    numbers = torch.full((128, 128), 1.0)
    numbers[0, :64] = 1e-20
    Fp8Recipe(recipe).quantize(numbers, GRADIENT)
    found = losses.describe(losses.local())["fp8"]["gradient"]
    lost = 0 if recipe == "mxfp8" else 64  # in MXFP8, two 1 x 32 blocks of small numbers have their own scales
    assert found == {"amax": 1.0, "underflow": float(f"{lost / 128**2:.6g}"), "saturated": 0.0}


def test_what_is_not_learnt_from_is_not_counted(losses: Fp8Losses) -> None:
    Fp8Recipe("tensorwise").quantize(torch.ones(4, 4), INPUT, twice=False)
    assert losses.describe(losses.local())["fp8"]["input"]["amax"] == 0.0
