"""FP8 rounds to the nearest number, checked with every number of each format; scales follow their formulas."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from nemo_upcycle.cpu.fp8_quantize import E4M3, E5M2, quantize
from nemo_upcycle.cpu.fp8_recipe import GRADIENT, INPUT, RECIPES, WEIGHT, DelayedScales, Fp8Recipe


ONE = torch.ones(())
FORMATS = pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448.0), (E5M2, 57344.0)], ids=["e4m3", "e5m2"])
ROLES = (INPUT, WEIGHT, GRADIENT)


def _every_number(dtype: torch.dtype) -> torch.Tensor:
    """Return all finite numbers of a format in ascending order, without -0."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return numbers[numbers.isfinite()].unique()


@FORMATS
def test_rounding_is_to_the_nearest_ties_to_even_and_saturates(dtype: torch.dtype, largest: float) -> None:
    numbers = _every_number(dtype).double()
    low, high = numbers[:-1], numbers[1:]
    middle = (low + high) / 2
    even = torch.arange(len(numbers)) % 2 == (len(numbers) // 2) % 2  # zero, in the middle, is even
    tied = torch.where(even[:-1], low, high)
    points = torch.cat([numbers, middle, (low + middle) / 2, (high + middle) / 2]).float()
    expected = torch.cat([numbers, tied, low, high]).float()
    assert expected.max() == largest
    assert torch.equal(quantize(points[None], dtype, (1, len(points)), scale=ONE).values()[0], expected)
    beyond = torch.tensor([[largest * 1.04, -largest * 100, torch.inf, -torch.inf]])
    assert quantize(beyond, dtype, (1, 4), scale=ONE).values().tolist() == [[largest, -largest] * 2]
    assert quantize(torch.tensor([[torch.nan]]), dtype, (1, 1), scale=ONE).values().isnan().all()


@FORMATS
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_largest_number_of_a_block_sets_its_scale(dtype: torch.dtype, largest: float, power_of_two: bool) -> None:
    x_RC = torch.randn(70, 300) * torch.logspace(-20, 20, 300)
    made = quantize(x_RC, dtype, (1, 128), power_of_two=power_of_two)
    for row, block in itertools.product((0, 33, 69), range(3)):
        amax = x_RC[row, block * 128 : (block + 1) * 128].abs().amax()
        scale = torch.tensor(largest) / amax
        if power_of_two:
            scale = 2.0 ** scale.log2().floor()
        assert made.scale_inv[row, block] == 1 / scale
        assert made.values()[row, block * 128 : (block + 1) * 128].abs().amax() == pytest.approx(amax.item(), rel=0.13)


def test_scales_of_zeros_and_of_tiny_numbers() -> None:
    tiny = torch.tensor([[0.0, 0.0, 1e-40, -1e-40]])
    assert quantize(tiny, E4M3, (1, 2)).scale_inv.tolist()[0][0] == 1
    assert quantize(tiny, E4M3, (1, 2)).scale_inv[0, 1] == 1 / torch.finfo(torch.float32).max
    assert quantize(tiny.bfloat16(), E4M3, (1, 2)).scale_inv[0, 1] == 1 / torch.finfo(torch.bfloat16).max
    assert quantize(tiny, E4M3, (1, 2), e8m0=True).scale_inv[0, 0] == 2.0**-127


@FORMATS
def test_mxfp8_takes_the_lowest_power_of_two_that_saturates_nothing(dtype: torch.dtype, largest: float) -> None:
    amax = torch.cat([largest * 2.0 ** torch.arange(-100, 100), largest * 1.001 * 2.0 ** torch.arange(-100, 100)])
    made = quantize(amax[:, None], dtype, (1, 32), e8m0=True)
    assert (amax / made.scale_inv[:, 0] <= largest).all()
    assert (amax / made.scale_inv[:, 0] > largest / 2).all()
    assert torch.equal(made.scale_inv, 2.0 ** made.scale_inv.log2().round())


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("role", ROLES)
def test_padding_with_zeros_changes_no_number(name: str, role: int) -> None:
    """An expert's tokens are padded to a multiple of 16 or 32; blocks of 128 rows need further padding."""
    x_RC = torch.randn(45, 160)
    padded = torch.nn.functional.pad(x_RC, (0, 0, 0, 19))
    for alone, among in zip(_both(name, x_RC, role), _both(name, padded, role), strict=True):
        assert torch.equal(alone.values(), among.values()[:45])
        assert not among.values()[45:].any()
    for made in _both(name, x_RC[:0], role):  # an expert without tokens
        assert made.values().shape == (0, 160)


def _both(name: str, x_RC: torch.Tensor, role: int) -> Any:
    return Fp8Recipe(name).quantize(x_RC, role, ONE if name == "delayed" else None)


def test_delayed_scaling_takes_the_largest_of_its_history() -> None:
    recipe, scales = Fp8Recipe("delayed", history=3, margin=1), DelayedScales(3)
    found = []
    for largest in (4.0, 2.0, 0.0, 1.0, 1.0, 1.0):
        scales.record(INPUT, torch.tensor([largest, -largest / 2]))
        scales.update(slice(0, 2), scales.history[0, :2].clone(), recipe)
        found.append(scales.scale[INPUT].item())
    # The all-zero pass changes neither scale nor history.
    assert found == [448 / 2 / largest for largest in (4, 4, 4, 4, 2, 1)]
    assert scales.scale[WEIGHT] == scales.scale[GRADIENT] == 1


def test_delayed_scaling_survives_a_checkpoint() -> None:
    scales = DelayedScales(4)
    scales.scale, scales.history = torch.rand(3), torch.rand(4, 3)
    back = DelayedScales.from_bytes(scales.to_bytes())
    assert back is not None
    assert torch.equal(back.scale, scales.scale)
    assert torch.equal(back.history, scales.history)
    assert torch.equal(back.resized(2).history, scales.history[:2])
    assert DelayedScales.from_bytes(None) is None
    assert DelayedScales.from_bytes(torch.empty(0, dtype=torch.uint8)) is None
