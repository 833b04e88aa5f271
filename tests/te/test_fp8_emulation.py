"""The CPU's FP8 numbers are bit-identical to Transformer Engine's own references, which run without a GPU.

The reference of current scaling came with Transformer Engine 2.16, which `make test-in ENV=bridge` has. With an older
Transformer Engine, the tests that need the reference are skipped.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nemo_upcycle.cpu.fp8_quantize import E4M3, E5M2
from nemo_upcycle.cpu.fp8_recipe import GRADIENT, INPUT, WEIGHT, DelayedScales, Fp8Recipe


SHAPES = [(1, 16), (48, 64), (257, 129)]
ROLES = {"input": INPUT, "weight": WEIGHT, "grad_output": GRADIENT}


def _numbers(shape: tuple[int, int], dtype: torch.dtype, spread: float) -> torch.Tensor:
    """Return normal random numbers with magnitudes from 2^-spread to 2^spread."""
    torch.manual_seed(math.prod(shape))
    return (torch.randn(shape) * torch.exp2(spread * (2 * torch.rand(shape) - 1))).to(dtype)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("spread", [0, 12, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("role", ROLES)
def test_current_scaling_has_the_bits_of_the_reference(
    role: str, shape: tuple[int, int], dtype: torch.dtype, spread: float, power_of_two: bool, monkeypatch: Any
) -> None:
    reference = pytest.importorskip("transformer_engine.pytorch.custom_recipes.quantization_ref_current_scaling")
    monkeypatch.setenv("NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES", str(int(power_of_two)))
    x_RC = _numbers(shape, dtype, spread)
    quantizer = reference.CurrentScalingQuantizerRef(
        E5M2 if role == "grad_output" else E4M3, pow_2_scales=power_of_two
    )
    wanted = quantizer.quantize(x_RC)
    along_columns, along_rows = Fp8Recipe("tensorwise").quantize(x_RC, ROLES[role])
    _same_bits(along_columns.data, wanted.data)
    _same_bits(along_rows.data.T.contiguous(), wanted.data_t)
    assert torch.equal(along_columns.scale_inv.flatten(), wanted.scale)
    assert torch.equal(along_columns.values(), quantizer.dequantize(wanted.data, wanted.scale))


def _same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 16])
@pytest.mark.parametrize("margin", [0, 2])
def test_delayed_scaling_moves_as_theirs(margin: int, length: int, algorithm: str, monkeypatch: Any) -> None:
    """Compare with the update that Transformer Engine has in Python. By default, it uses a kernel instead.

    The kernel does not change the scales of unseen tensors. The kernel divides a number by a tensor. Torch multiplies
    the number by the tensor's reciprocal, which rounds once more. In float64, this rounding makes no difference.
    """
    quantization = pytest.importorskip("transformer_engine.pytorch.quantization")
    from transformer_engine.common.recipe import DelayedScaling

    compiled = quantization._default_sf_compute  # asks for a CUDA device
    monkeypatch.setattr(quantization, "_default_sf_compute", compiled.__wrapped__)
    theirs = DelayedScaling(margin=margin, amax_history_len=length, amax_compute_algo=algorithm)
    recipe, scales = Fp8Recipe("delayed", margin=margin, history=length, algorithm=algorithm), DelayedScales(length)
    history, scale = torch.zeros(length, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    torch.manual_seed(length)
    for step in range(3 * length + 2):
        largest = torch.rand(2) * 10.0 ** torch.randint(-30, 30, (2,))
        if step == 3:
            largest[0] = torch.inf
        history[0] = largest
        quantization._amax_and_scale_update(history, scale, 448.0, theirs)
        scales.update(slice(INPUT, GRADIENT), largest, recipe)
        assert torch.equal(scales.scale[:GRADIENT], scale.float())
        assert torch.equal(scales.history[:, :GRADIENT], history.float())


def test_a_gpu_takes_what_a_cpu_saved_for_no_history() -> None:
    """Transformer Engine does not fail on the saved bytes, and unpickles only None."""
    import pickle

    state = DelayedScales(1024).to_bytes()
    assert pickle.loads(state.numpy().tobytes()) is None
    guard = pytest.importorskip("transformer_engine.pytorch._extra_state")
    assert guard.should_load_extra_state_pickle(state.numpy().tobytes(), "Linear") is False
