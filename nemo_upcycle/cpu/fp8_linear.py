"""Megatron's local linear layers in FP8: their three products, and the places where Megatron switches FP8 on.

A Megatron layer computes in FP8 if the same layer of Transformer Engine would compute in FP8. Both layers use FP8
inside the context that Megatron itself enters for a block or a layer. Megatron does not enter the context for
embeddings, for the output layer, or for first and last layers in BF16. Routers and norms are not Megatron's linear
layers, so they never use FP8. Products of quantised numbers are summed in float32.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version

from nemo_upcycle.cpu.fp8_quantize import Quantized
from nemo_upcycle.cpu.fp8_recipe import GRADIENT, INPUT, WEIGHT, DelayedScales, Fp8Recipe, update_scales
from nemo_upcycle.utils.attributes import temporarily_set


logger = logging.getLogger(__name__)

_FORWARD, _BACKWARD = slice(INPUT, GRADIENT), slice(GRADIENT, GRADIENT + 1)


@dataclass
class _Now:
    """The current state of a forward or backward pass.

    Attributes:
        recipe: recipe of the linear layers; with None, the layers compute in the type of their inputs.
        first: whether no layer has computed since the context was entered.
        tape: scales of layers whose activations are recomputed, in the order of the layers.
        replays: whether scales are taken from the tape.
    """

    recipe: Fp8Recipe | None = None
    first: bool = False
    tape: deque[torch.Tensor] | None = None
    replays: bool = False


_now = _Now()


@contextmanager
def computing(recipe: Fp8Recipe | None) -> Iterator[None]:
    """Let Megatron's linear layers compute by a recipe; with delayed scaling, compute the next scales at the end."""
    with temporarily_set(_now, "recipe", recipe), temporarily_set(_now, "first", True):
        yield
    if recipe and recipe.name == "delayed" and _now.recipe is None and torch.is_grad_enabled():
        update_scales(recipe, _FORWARD)


class _Fp8Product(torch.autograd.Function):
    """Computes x W^T + b from quantised operands, with a gradient for each operand."""

    @staticmethod
    def forward(  # noqa: PLR0913 - the context and eight more
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        recipe: Fp8Recipe,
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
        state: DelayedScales | None,
        learns: bool,
        is_first: bool,
    ) -> torch.Tensor:
        x_TI, x_by_token = recipe.quantize(x.reshape(-1, x.shape[-1]), INPUT, scales[INPUT], twice=learns)
        weight_OI, weight_by_output = recipe.quantize(weight, WEIGHT, scales[WEIGHT], twice=learns)
        y_TO = x_TI.values() @ weight_OI.values().T
        if bias is not None:
            y_TO += bias
        ctx.save_for_backward(x_by_token.data, x_by_token.scale_inv, weight_by_output.data, weight_by_output.scale_inv)
        ctx.blocks = x_by_token.block, weight_by_output.block
        ctx.recipe, ctx.state, ctx.is_first = recipe, state, is_first
        ctx.types = weight.dtype, None if bias is None else bias.dtype
        return y_TO.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        recipe, state = ctx.recipe, ctx.state
        x_data, x_scales, weight_data, weight_scales = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        if state is not None:
            state.record(GRADIENT, grad_TO)
        grad_by_output, grad_by_token = recipe.quantize(
            grad_TO, GRADIENT, None if state is None else state.scale[GRADIENT]
        )
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad_by_output.values() @ Quantized(weight_data, weight_scales, ctx.blocks[WEIGHT]).values()
            x_grad = x_grad.to(grad.dtype).view(*grad.shape[:-1], weight_data.shape[1])
        if ctx.needs_input_grad[1]:
            weight_grad = grad_by_token.values().T @ Quantized(x_data, x_scales, ctx.blocks[INPUT]).values()
            weight_grad = weight_grad.to(ctx.types[0])
        if ctx.needs_input_grad[2]:
            bias_grad = grad_TO.float().sum(0).to(ctx.types[1])
        if state is not None and ctx.is_first:  # the first layer's gradient comes last
            update_scales(recipe, _BACKWARD)
        return x_grad, weight_grad, bias_grad, None, None, None, None, None


def _forward(module: Any, recipe: Fp8Recipe, call: dict[str, Any]) -> torch.Tensor:
    """Compute the product of a Megatron linear layer in FP8, with the same communication."""
    from megatron.core.tensor_parallel import mappings

    x, weight, bias = call["input"], call["weight"], call["bias"]
    if call["sequence_parallel"]:
        x = mappings.gather_from_sequence_parallel_region(x, group=call["tp_group"])
    elif call["allreduce_dgrad"]:
        x = mappings.copy_to_tensor_model_parallel_region(x, group=call["tp_group"])
    state: DelayedScales | None = None
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if recipe.name == "delayed":
        state = _state_of(module, recipe)
        scales = _delayed_scales(module, state, x, weight)
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    is_first = _now.first and learns
    _now.first = _now.first and not is_first
    y: torch.Tensor = _Fp8Product.apply(x, weight, bias, recipe, scales, state, learns, is_first)
    return y


def _state_of(module: Any, recipe: Fp8Recipe) -> DelayedScales:
    if module.fp8_scales is None:
        module.fp8_scales = DelayedScales(recipe.history)
    state: DelayedScales = module.fp8_scales
    return state.resized(recipe.history)


def _delayed_scales(
    module: Any, state: DelayedScales, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of this pass, and record its largest numbers for later passes.

    A weight is quantised once per step, as in Transformer Engine, which keeps the result for further micro-batches.
    """
    if _now.tape is not None and _now.replays:
        return _now.tape.popleft(), _now.tape.popleft()
    state.record(INPUT, x)
    if module.is_first_microbatch or module.config.disable_parameter_transpose_cache:
        state.record(WEIGHT, weight)
        state.weight_scale = state.scale[WEIGHT].clone()
        module.is_first_microbatch = False
    scales = state.scale[INPUT].clone(), state.weight_scale
    if _now.tape is not None:
        _now.tape.extend(scales)
    return scales


def _context(config: Any, layer_no: int = -1, is_init: bool = False) -> AbstractContextManager[None]:
    """Replace Megatron's `get_fp8_context` for the local layers, and refuse the FP4 of `get_fp4_context`."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    if is_init or not (config.fp8 or config.fp4) or is_first_last_bf16_layer(config, layer_no):
        return nullcontext()
    recipe = Fp8Recipe.of(config)
    _say_once(recipe.name)
    return computing(recipe)


@functools.cache
def _say_once(recipe: str) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.warning(
            "Low precision (%s) is emulated on this CPU: steps take several times as long as in BF16", recipe
        )


def _checkpoint(
    function: Callable[..., Any],
    distribute: bool,
    get_rng_state_tracker: Any,
    tp_group: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Recompute activations as Transformer Engine's `checkpoint` does: in FP8, with the scales of the first pass."""
    from megatron.core import tensor_parallel

    recipe, passes = _now.recipe, 0
    tape: deque[torch.Tensor] = deque()

    def run(*inputs: Any) -> Any:
        nonlocal passes
        passes += 1
        context: AbstractContextManager[None] = nullcontext() if passes == 1 else computing(recipe)
        with temporarily_set(_now, "tape", tape), temporarily_set(_now, "replays", passes > 1), context:
            return function(*inputs, **kwargs)

    return tensor_parallel.checkpoint(run, distribute, *args)


def _get_extra_state(module: Any) -> torch.Tensor | None:
    return None if module.fp8_scales is None else module.fp8_scales.to_bytes()


def _set_extra_state(module: Any, state: Any) -> None:
    if (scales := DelayedScales.from_bytes(state)) is not None:
        module.fp8_scales = scales


def _or_in_fp8(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(product)
    def compute(module: Any, **call: Any) -> torch.Tensor:
        return product(module, **call) if _now.recipe is None else _forward(module, _now.recipe, call)

    return compute


def emulate_fp8() -> None:
    """Emulate a recipe's `fp8_recipe` in Megatron's local layers, and refuse `fp4_recipe`.

    Without this patch an FP8 recipe trains in BF16, and a recipe with experts fails. If Transformer Engine is missing,
    the recipe does not start, because Megatron compares the version of Transformer Engine with None. If Transformer
    Engine is installed, the recipe cannot recompute, because Transformer Engine's `checkpoint` needs CUDA.
    """
    from megatron.core import fp4_utils, fp8_utils, utils
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import layers, random
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.moe import moe_layer

    utils._te_version = utils.get_te_version() or Version("1.11")  # first version allowed for FP8 experts
    for name, stock in {
        "get_fp8_context": fp8_utils.get_fp8_context,
        "get_fp4_context": fp4_utils.get_fp4_context,
    }.items():
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is stock:
                setattr(module, name, _context)
    transformer_engine.te_checkpoint = transformer_block.te_checkpoint = moe_layer.te_checkpoint = _checkpoint
    if find_spec("megatron.core.recompute"):  # only in later releases
        from megatron.core import recompute

        recompute.te_checkpoint = _checkpoint
    remember = random.CheckpointWithoutOutput.__init__  # recomputes norms and activations, which have no products
    random.CheckpointWithoutOutput.__init__ = lambda self, fp8=None: remember(self, fp8=None)
    for linear in (layers.ColumnParallelLinear, layers.RowParallelLinear):
        linear._forward_impl = _or_in_fp8(linear._forward_impl)
        linear.fp8_scales, linear.is_first_microbatch = None, True  # Megatron sets is_first_microbatch every step
        linear.get_extra_state, linear.set_extra_state = _get_extra_state, _set_extra_state
