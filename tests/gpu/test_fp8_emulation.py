"""FP8 on the CPU and on the card: every quantizer gives the same bits, and products differ only by rounding.

    python -m pytest -m gpu tests/gpu/test_fp8_emulation.py

Blockwise scaling is compared on Hopper and MXFP8 on Blackwell, because other cards have no kernels for them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle.cpu.fp8_linear import _Fp8Product
from nemo_upcycle.cpu.fp8_quantize import Quantized
from nemo_upcycle.cpu.fp8_recipe import GRADIENT, INPUT, RECIPES, WEIGHT, DelayedScales, Fp8Recipe
from tests.gpu.needs import NEEDS_CARD


pytestmark = NEEDS_CARD
ROLES = {"input": INPUT, "weight": WEIGHT, "gradient": GRADIENT}
SHAPE = (256, 384)


def _require_kernels(recipe: str) -> None:
    major = torch.cuda.get_device_capability()[0]
    if (recipe == "blockwise" and major != 9) or (recipe == "mxfp8" and major < 10):
        pytest.skip(f"this card has no kernels of {recipe}")


def _card_numbers(recipe: str, role: str, x_RC: torch.Tensor, scale: torch.Tensor) -> Any:
    """Quantise a matrix with the card's own quantizer."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    dtype = tex.DType.kFloat8E5M2 if role == "gradient" else tex.DType.kFloat8E4M3
    if recipe == "delayed":
        return Float8Quantizer(scale.view(1).cuda(), torch.zeros(1, device="cuda"), dtype)(x_RC)
    if recipe == "tensorwise":
        return Float8CurrentScalingQuantizer(dtype, device=torch.device("cuda"))(x_RC)
    if recipe == "mxfp8":
        return MXFP8Quantizer(dtype)(x_RC)
    dimensions = 2 if role == "weight" else 1
    return Float8BlockQuantizer(
        dtype, rowwise=True, columnwise=True, force_pow_2_scales=True, block_scaling_dim=dimensions
    )(x_RC)


@pytest.mark.parametrize("spread", [0, 12])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_are_the_cards_to_the_bit(recipe: str, role: str, spread: int) -> None:
    _require_kernels(recipe)
    torch.manual_seed(spread)
    x_RC = (torch.randn(SHAPE) * torch.exp2(spread * (2 * torch.rand(SHAPE) - 1))).bfloat16()
    scale = torch.tensor(3.7)
    ours, across = Fp8Recipe(recipe).quantize(x_RC, ROLES[role], scale if recipe == "delayed" else None)
    theirs = _card_numbers(recipe, role, x_RC.cuda(), scale)
    if recipe in ("delayed", "tensorwise"):
        _same_bits(ours, theirs._data)
        assert torch.equal(ours.scale_inv.flatten(), theirs._scale_inv.cpu().flatten())
    else:
        _same_bits(ours, theirs._rowwise_data)
        columns = theirs._columnwise_data.cpu()  # the blockwise quantizer transposes the columns
        _same_bits(across, columns.T.contiguous() if recipe == "blockwise" else columns)


def _same_bits(ours: Quantized, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.data.view(torch.uint8), theirs.cpu().view(torch.uint8))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_layer_gives_what_the_cards_gives(recipe: str) -> None:
    """Sums have another order, and Hopper has shorter accumulators. Without FP8, the error at least doubles."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    _require_kernels(recipe)
    made = {
        "delayed": lambda: recipes.DelayedScaling(),
        "tensorwise": lambda: recipes.Float8CurrentScaling(),
        "blockwise": lambda: recipes.Float8BlockScaling(fp8_format=recipes.Format.HYBRID),
        "mxfp8": lambda: recipes.MXFP8BlockScaling(fp8_format=recipes.Format.HYBRID),
    }[recipe]()
    torch.manual_seed(0)
    layer = te.Linear(384, 512, bias=False, params_dtype=torch.bfloat16)
    x = torch.randn(256, 384, dtype=torch.bfloat16)
    grad = torch.randn(256, 512, dtype=torch.bfloat16)
    found = {}
    on_card = x.cuda().requires_grad_()
    with te.fp8_autocast(enabled=True, fp8_recipe=made):
        y = layer(on_card)
    y.backward(grad.cuda())
    found["card"] = [tensor.detach().cpu() for tensor in (y, on_card.grad, layer.weight.grad)]
    state = DelayedScales(1024) if recipe == "delayed" else None
    scales = (state.scale[INPUT], state.scale[WEIGHT]) if state else (None, None)
    for name in ("emulated", "bf16"):
        ours, weight = x.clone().requires_grad_(), layer.weight.detach().cpu().requires_grad_()
        if name == "bf16":
            y = ours @ weight.T
        else:
            y = _Fp8Product.apply(ours, weight, None, Fp8Recipe(recipe), scales, state, True, False)
        y.backward(grad)
        found[name] = [tensor.detach() for tensor in (y, ours.grad, weight.grad)]
    for card, emulated, plain in zip(found["card"], found["emulated"], found["bf16"], strict=True):
        assert _distance(emulated, card) < 5e-3
        assert _distance(plain, card) > 2 * _distance(emulated, card)


def _distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())
