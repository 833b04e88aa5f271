"""Expert weights: copies are bit-identical, noise and new neurons spread correctly, and sharding changes nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.init.experts import BLOCK, ExpertMatrix, fill_copies
from nemo_upcycle.init.methods import METHODS
from nemo_upcycle.init.methods.drop import dropped_neurons


NOISE = UpcycleSpec(method="noise", noise_std=0.1)
DROP = UpcycleSpec(method="drop", drop_ratio=0.3)
NEURONS, WIDTH = 2 * BLOCK + 88, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_copies_carry_the_same_bits(dtype: torch.dtype) -> None:
    dense_FD = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    dense_FD[0, :3] = torch.tensor([float("-0.0"), torch.finfo(dtype).tiny, torch.finfo(dtype).max])
    experts = [dense_FD.clone(), *(torch.full_like(dense_FD, float("nan")) for _ in range(3))]
    places = [expert.data_ptr() for expert in experts]
    fill_copies(experts)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    for expert in experts:
        assert torch.equal(expert.view(bits), dense_FD.view(bits))
    assert [expert.data_ptr() for expert in experts] == places


def _weight(neurons: int = NEURONS, mean: float = 0.0, std: float = 0.1) -> torch.Tensor:
    return torch.randn(neurons, WIDTH, generator=torch.Generator().manual_seed(5)) * std + mean


def _changed(spec: UpcycleSpec, dense_FD: torch.Tensor, *, part: str = "up", cuts: Sequence[int] = ()) -> torch.Tensor:
    """Return an expert's matrix made by several ranks; each rank has the neurons between two cuts."""
    bounds = (0, *cuts, len(dense_FD))
    locals_FD = [dense_FD[start:stop].clone() for start, stop in pairwise(bounds)]
    for start, local_FD in zip(bounds, locals_FD, strict=False):
        METHODS[spec.method].change(ExpertMatrix(2, 1, part, start, local_FD, dense_FD.clone), spec)
    return torch.cat(locals_FD)


def test_noise_is_normal_and_relative_to_the_weights_own_deviation() -> None:
    dense_FD = _weight(mean=3.0, std=0.25)
    drawn = (_changed(NOISE, dense_FD).double() - dense_FD) / (0.1 * dense_FD.double().std(correction=0))
    count = drawn.numel()
    assert abs(float(drawn.mean())) < 5 / math.sqrt(count)
    assert float(drawn.std()) == pytest.approx(1.0, rel=5 / math.sqrt(2 * count))
    assert float((drawn.abs() > 2).double().mean()) == pytest.approx(0.0455, abs=0.01)


@pytest.mark.parametrize("spec", [NOISE, DROP], ids=["noise", "drop"])
def test_a_down_projection_is_changed_through_its_transposed_view(spec: UpcycleSpec) -> None:
    down_DF = _weight().T.contiguous()
    view_FD = down_DF.T
    METHODS[spec.method].change(ExpertMatrix(2, 1, "down", 0, view_FD, view_FD.clone), spec)
    assert torch.equal(down_DF.T, _changed(spec, _weight(), part="down"))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.999, 1.0])
def test_gate_up_and_down_redraw_the_same_neurons(ratio: float) -> None:
    spec = UpcycleSpec(method="drop", drop_ratio=ratio)
    # In floating point, 0.41 * 600 is 245.99999999999997.
    assert len(dropped_neurons(UpcycleSpec(method="drop", drop_ratio=0.41), 0, 0, 600)) == 246
    chosen = dropped_neurons(spec, 2, 1, NEURONS)
    assert len(chosen.unique()) == len(chosen) == math.floor(ratio * NEURONS)
    dense_FD = _weight()
    kept = torch.ones(NEURONS, dtype=torch.bool)
    kept[chosen] = False
    for part in ("gate", "up", "down"):
        new_FD = _changed(spec, dense_FD, part=part)
        assert torch.equal(new_FD[kept], dense_FD[kept])
        assert bool((new_FD[chosen] != dense_FD[chosen]).any(1).all())


def test_new_neurons_have_the_statistics_of_those_they_replace() -> None:
    dense_FD = _weight()
    chosen = dropped_neurons(DROP, 2, 1, NEURONS)
    dense_FD[chosen] = dense_FD[chosen] * 3 + 2.0  # make these neurons unlike the rest
    new = _changed(DROP, dense_FD)[chosen].double()
    mean, deviation = dense_FD[chosen].double().mean(), dense_FD[chosen].double().std()
    assert float(new.mean()) == pytest.approx(float(mean), abs=5 * float(deviation) / math.sqrt(new.numel()))
    assert float(new.std()) == pytest.approx(float(deviation), rel=5 / math.sqrt(2 * new.numel()))
    old = dense_FD[chosen].double()
    correlation = torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(new.numel())


@pytest.mark.parametrize(
    ("spec", "digest"),
    [
        (NOISE, "ea0d722a06d4e0f1f2f2fee4f192a893917bac09529ff46b6fad84eab30064b2"),
        (DROP, "04cf5e051e65a75ac572450a738d476959e96eb98cc39fa6b853397c423d674e"),
    ],
    ids=["noise", "drop"],
)
def test_bits_are_what_they_were(spec: UpcycleSpec, digest: str) -> None:
    """Golden values: the same seed gives the same model in every future version."""
    dense_FD = torch.arange(NEURONS * WIDTH, dtype=torch.float32).view(NEURONS, WIDTH) / 64
    new_FD = _changed(spec, dense_FD).bfloat16().view(torch.int16)
    assert hashlib.sha256(new_FD.numpy().tobytes()).hexdigest() == digest
