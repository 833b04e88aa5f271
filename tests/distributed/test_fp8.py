"""Megatron's layers in FP8 on one or more ranks: which products use FP8, their values, and when scales change."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from tests.distributed.ranks import run_ranks
from tests.models import MemorySource, build_chunks, small_architecture


pytestmark = [pytest.mark.slow, pytest.mark.full]
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
ARCH = small_architecture(num_layers=3)
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def _model(recipe: str | None, *, layout: dict[str, int] | None = None, **changes: Any) -> Any:
    fp8 = {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max"}
    torch.manual_seed(0)
    (model,) = build_chunks(ARCH, num_experts=4, layout=layout, **((fp8 if recipe else {}) | changes))
    return model


def _loss(model: Any, seed: int = 0) -> torch.Tensor:
    """Return the loss of 2 x 32 tokens; every rank has the same rows."""
    numbers = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(0, 250, (2, 32), generator=numbers)
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).triu(1)
    losses = model(tokens_BS, torch.arange(32).expand(2, -1), mask, labels=tokens_BS.roll(-1, 1))
    return losses.float().mean()


def _step(model: Any, seed: int = 0, first: bool = True) -> float:
    if first:
        model.zero_grad()
        model.set_is_first_microbatch()
    loss = _loss(model, seed)
    loss.backward()
    return loss.item()


def _recorded(recipe: str | None, **changes: Any) -> dict[str, list[str]]:
    """Run one pass, and group the names of its linear layers by the kind of their products (`fp8` or `plain`)."""
    from megatron.core.tensor_parallel import layers

    from nemo_upcycle.cpu import fp8_linear

    model = _model(recipe, **changes)
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, list[str]] = {"fp8": [], "plain": []}
    forward, product = fp8_linear._forward, layers.linear_with_grad_accumulation_and_async_allreduce

    def in_fp8(module: Any, *args: Any) -> Any:
        found["fp8"].append(names[id(module)])
        return forward(module, *args)

    @functools.wraps(product)
    def plain(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        owner = next(name for name, parameter in model.named_parameters() if parameter is weight)
        found["plain"].append(owner.removesuffix(".weight"))
        return product(x, weight, *args, **kwargs)

    fp8_linear._forward, layers.linear_with_grad_accumulation_and_async_allreduce = in_fp8, plain
    _loss(model)
    return found


def test_linear_layers_compute_in_fp8_and_nothing_else_does() -> None:
    (found,) = run_ranks(functools.partial(_recorded, "delayed"), 1)
    assert {name.rpartition(".")[2] for name in found["fp8"]} == set(LINEAR)
    assert len(found["fp8"]) == 3 * (2 + 4 * 2)
    assert found["plain"] == ["output_layer"]


def test_first_and_last_layers_can_be_excluded() -> None:
    ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    (found,) = run_ranks(functools.partial(_recorded, "tensorwise", **ends), 1)
    assert {name.split(".")[2] for name in found["fp8"]} == {"1"}
    assert {name.split(".")[2] for name in found["plain"] if name != "output_layer"} == {"0", "2"}


def _products(recipe: str) -> dict[str, float]:
    """Compare a layer's three products with float64 products of its quantised operands."""
    from nemo_upcycle.cpu.fp8_linear import computing
    from nemo_upcycle.cpu.fp8_recipe import GRADIENT, INPUT, WEIGHT, Fp8Recipe

    layer = _model(recipe).decoder.layers[0].mlp.experts.local_experts[0].linear_fc1
    one = torch.ones(()) if recipe == "delayed" else None
    numbers = Fp8Recipe(recipe)
    x = torch.randn(40, 1, 64, requires_grad=True)
    grad = torch.randn(40, 1, layer.weight.shape[0])
    with computing(numbers):
        y, _ = layer(x)
    y.backward(grad)
    pairs = (x[:, 0], INPUT), (layer.weight, WEIGHT), (grad[:, 0], GRADIENT)
    (x_1, x_2), (w_1, w_2), (g_1, g_2) = (
        [made.values().double() for made in numbers.quantize(tensor.detach(), role, one)] for tensor, role in pairs
    )
    return {
        "y": (y[:, 0] - x_1 @ w_1.T).abs().max().item(),
        "x": (x.grad[:, 0] - g_1 @ w_2).abs().max().item(),
        "weight": (layer.weight.grad - g_2.T @ x_2).abs().max().item(),
        "rounded": (y[:, 0] - x[:, 0] @ layer.weight.T).abs().max().item(),
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_the_quantised_operands(recipe: str) -> None:
    (off,) = run_ranks(functools.partial(_products, recipe), 1)
    assert max(off["y"], off["x"], off["weight"]) < 1e-4
    assert off["rounded"] > 1e-3


def _delayed(**changes: Any) -> dict[str, Any]:
    """Return losses, scales and gradients of two steps with delayed scaling, with two micro-batches each."""
    model = _model("delayed", **changes)
    layer = model.decoder.layers[0].self_attention.linear_qkv
    losses, scales = [], []
    for step in range(2):
        for micro_batch in range(2):
            losses.append(_step(model, 2 * step + micro_batch, first=micro_batch == 0))
            scales.append([*layer.fp8_scales.scale.tolist(), layer.fp8_scales.weight_scale.item()])
    grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return {"losses": losses, "scales": scales, "grads": grads, "weight": layer.weight.abs().max().item()}


def test_scales_move_after_each_pass() -> None:
    (found,) = run_ranks(_delayed, 1)
    inputs, weights, gradients, used = zip(*found["scales"], strict=True)
    assert 1 not in (*inputs, *weights, *gradients)
    assert weights == (pytest.approx(448 / found["weight"]),) * 4
    assert used == (1, 1, *weights[:2])
    assert inputs[0] >= inputs[1] >= inputs[2]  # scales follow the largest value of the history
    assert gradients[0] > 1e3  # at scale 1, a step would lose most gradients


def test_recomputed_layers_take_the_scales_of_the_first_time() -> None:
    """Gradients are bit-identical, and each value enters the history only once."""
    whole = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    part = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    (plain,), (full,), (moe,) = (run_ranks(functools.partial(_delayed, **kind), 1) for kind in ({}, whole, part))
    for other in (full, moe):
        assert other["losses"] == plain["losses"]
        assert other["scales"] == plain["scales"]
        assert torch.equal(other["grads"], plain["grads"])


def _first_losses(layout: dict[str, int]) -> dict[str, float]:
    """Return this rank's loss for each recipe; all ranks fill their models from the same weights."""
    losses, spec = {}, UpcycleSpec(num_experts=4, top_k=2, method="noise", noise_std=0.5)
    for recipe in RECIPES:
        model = _model(recipe, layout=layout)
        upcycle_into([model], MemorySource(ARCH), spec)
        losses[recipe] = _step(model)
    return losses


def test_ranks_that_share_the_experts_compute_as_one() -> None:
    """Compare the losses of step 0, before ranks share the scales of their experts."""
    (alone,) = run_ranks(_first_losses, 1, {})
    for losses in run_ranks(_first_losses, 2, {"ep": 2}):
        assert losses == pytest.approx(alone, rel=1e-5)


def _shared_scales() -> list[list[float]]:
    model = _model("delayed", layout={"ep": 2})
    for _ in range(2):
        _step(model, torch.distributed.get_rank())
    return [module.fp8_scales.scale.tolist() for module in model.modules() if getattr(module, "fp8_scales", None)]


def test_ranks_share_the_scales_of_delayed_scaling() -> None:
    """As in Transformer Engine, an expert shares scales with the experts at the same position on other ranks."""
    first, second = run_ranks(_shared_scales, 2)
    assert len(first) == 3 * (2 + 2 * 2)
    assert first == second


@pytest.mark.parametrize(
    ("recipe", "changes", "got"),
    [
        ("tensorwise", {"fp8_dot_product_attention": True}, "fp8_dot_product_attention"),
        (None, {"fp4": "e2m1", "fp4_recipe": "nvfp4"}, "fp4_recipe nvfp4"),
    ],
)
def test_what_is_not_emulated_is_refused(recipe: str | None, changes: dict[str, Any], got: str) -> None:
    with pytest.raises(RuntimeError, match=f"Error: This CPU does not emulate {got}. Train"):
        run_ranks(functools.partial(_recorded, recipe, **changes), 1)
