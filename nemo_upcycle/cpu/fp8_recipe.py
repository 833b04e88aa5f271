"""Megatron's FP8 recipes: which operands they quantise in which blocks, and the state of delayed scaling."""

from __future__ import annotations

import itertools
import os
import pickle
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from nemo_upcycle.cpu.fp8_quantize import E4M3, E5M2, Quantized, quantize
from nemo_upcycle.errors import UpcycleError


#: Operands of a linear layer, in the order of a state's columns.
INPUT, WEIGHT, GRADIENT = range(3)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
#: Object that counts the numbers that a training quantises. `monitoring.fp8_statistics.watch_fp8` sets it.
watcher: Any = None
#: Settings that make Transformer Engine use FP8 outside linear layers, or skip FP8 in some linear layers.
_ELSEWHERE = ("fp8_dot_product_attention", "fp8_multi_head_attention", "fp8_output_proj")


@dataclass(frozen=True)
class Fp8Recipe:
    """One FP8 recipe.

    Attributes:
        name: Megatron's name of the recipe, one of `RECIPES`.
        gradient: FP8 type of output gradients; the type of inputs and weights is always E4M3.
        margin, history, algorithm: parameters of delayed scaling, the same as Megatron's `fp8_margin`,
            `fp8_amax_history_len` and `fp8_amax_compute_algo`.
        group: ranks that share their largest numbers under delayed scaling; None: this rank shares nothing.
    """

    name: str
    gradient: torch.dtype = E5M2
    margin: int = 0
    history: int = 1024
    algorithm: str = "max"
    group: Any = None

    @classmethod
    def of(cls, config: Any) -> Fp8Recipe:
        """Return the recipe of a Megatron `TransformerConfig` whose `fp8` or `fp4` is set.

        Raises:
            UpcycleError: the configuration asks for a recipe or a setting that is not emulated.
        """
        from megatron.core import parallel_state

        low = config.fp4_recipe if config.fp4 else config.fp8_recipe
        name = getattr(low, "value", low)
        elsewhere = [field for field in _ELSEWHERE if getattr(config, field, False)]
        if name not in RECIPES or elsewhere or not config.fp8_wgrad:
            setting = "fp4_recipe" if config.fp4 else "fp8_recipe"
            got = f"{setting} {name}" if name not in RECIPES else elsewhere[0] if elsewhere else "fp8_wgrad=False"
            fix = f"train on a GPU, or use one of {', '.join(RECIPES)} in linear layers only"
            raise UpcycleError("This CPU", kind="refused", got=f"does not emulate {got}", fix=fix)
        group = None
        if name == "delayed" and parallel_state.model_parallel_is_initialized():
            group = parallel_state.get_amax_reduction_group(
                with_context_parallel=True, tp_only_amax_red=config.tp_only_amax_red
            )
        return cls(
            name=name,
            gradient=E5M2 if config.fp8 == "hybrid" else E4M3,
            margin=config.fp8_margin,
            history=config.fp8_amax_history_len,
            algorithm=config.fp8_amax_compute_algo,
            group=group,
        )

    def dtype(self, role: int) -> torch.dtype:
        """Return the FP8 type of an operand."""
        return self.gradient if role == GRADIENT else E4M3

    def quantize(
        self, x_RC: torch.Tensor, role: int, scale: torch.Tensor | None = None, *, twice: bool = True
    ) -> tuple[Quantized, Quantized]:
        """Quantise a matrix once for products over its columns and once for products over its rows.

        Both results are computed from the matrix before quantisation.

        Args:
            x_RC: an input [tokens, in], a weight [out, in] or an output's gradient [tokens, out].
            role: INPUT, WEIGHT or GRADIENT.
            scale: scale of delayed scaling; None with other recipes.
            twice: whether the caller also needs products over the rows; if not, the first result is returned twice.
        """
        along_columns, along_rows = self._blocks(role, x_RC.shape)
        options: dict[str, Any] = {"scale": scale}
        if self.name == "tensorwise":
            options["power_of_two"] = os.environ.get("NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES", "0") == "1"
        elif self.name == "blockwise":
            options["power_of_two"] = os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0") != "1"
        elif self.name == "mxfp8":
            options["e8m0"] = True
        first = quantize(x_RC, self.dtype(role), along_columns, **options)
        if watcher is not None and twice:
            watcher.count(role, x_RC, first, has_own_scale=scale is None)
        if along_columns == along_rows or not twice:
            return first, first
        return first, quantize(x_RC, self.dtype(role), along_rows, **options)

    def _blocks(self, role: int, shape: torch.Size) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.name == "mxfp8":
            return (1, 32), (32, 1)
        if self.name == "blockwise":
            return ((128, 128), (128, 128)) if role == WEIGHT else ((1, 128), (128, 1))
        whole = max(1, shape[0]), max(1, shape[1])
        return whole, whole


#: First bytes of a layer's state in a checkpoint: a pickled None. Transformer Engine stops reading after this None.
#: A run that resumes from a CPU's checkpoint on a GPU therefore starts without a history, as from a BF16 checkpoint.
_NOTHING = pickle.dumps(None, protocol=4)


class DelayedScales:
    """The state of delayed scaling for one linear layer, as in Transformer Engine.

    Args:
        length: number of rows of the history.

    Attributes:
        scale: scales, float32 [3], by role.
        history: largest numbers, float32 [length, 3]. The first row collects the numbers of the present pass.
        weight_scale: scale of the weight throughout a step.
    """

    def __init__(self, length: int) -> None:
        self.scale = torch.ones(3)
        self.history = torch.zeros(length, 3)
        self.weight_scale = self.scale[WEIGHT]
        _STATES[next(_NUMBERS)] = self

    def record(self, role: int, x: torch.Tensor) -> None:
        """Record the largest number of an operand."""
        if x.numel():
            torch.maximum(self.history[0, role], x.detach().abs().amax().float(), out=self.history[0, role])

    def update(self, roles: slice, amax: torch.Tensor, recipe: Fp8Recipe) -> None:
        """Compute the next scales; an operand that was not seen, or was all zero, keeps its scale and its history."""
        history = self.history[:, roles]
        history[0] = amax
        peak = history.amax(0) if recipe.algorithm == "max" else amax
        seen = amax != 0
        rolled = history.roll(-1, 0)
        rolled[0] = 0
        history[:, seen] = rolled[:, seen]
        largest = torch.tensor([torch.finfo(recipe.dtype(role)).max for role in range(3)])[roles]
        scale = largest / 2.0**recipe.margin / peak
        scale = torch.where(scale.isinf(), torch.finfo(torch.float32).max, scale)
        self.scale[roles] = torch.where(seen & peak.isfinite() & (peak > 0), scale, self.scale[roles])

    def to_bytes(self) -> torch.Tensor:
        """Return the state as bytes (uint8) for a checkpoint."""
        numbers = torch.cat([self.scale[None], self.history])
        return torch.frombuffer(bytearray(_NOTHING + numbers.numpy().tobytes()), dtype=torch.uint8)

    @classmethod
    def from_bytes(cls, state: Any) -> DelayedScales | None:
        """Read a state that `to_bytes` wrote; None for any other state, such as Transformer Engine's."""
        if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
            return None
        data = state.numpy().tobytes()
        if not data.startswith(_NOTHING) or len(data) == len(_NOTHING):
            return None
        numbers = torch.frombuffer(bytearray(data[len(_NOTHING) :]), dtype=torch.float32).view(-1, 3)
        scales = cls(len(numbers) - 1)
        scales.scale, scales.history = numbers[0].clone(), numbers[1:].clone()
        return scales

    def resized(self, length: int) -> DelayedScales:
        """Return the state with a history of another length; older rows are dropped, missing rows are zero."""
        if length != len(self.history):
            self.history = torch.nn.functional.pad(self.history, (0, 0, 0, length - len(self.history)))
        return self


_NUMBERS = itertools.count()
#: States of all layers that have computed in FP8, in the order of their first passes.
_STATES: weakref.WeakValueDictionary[int, DelayedScales] = weakref.WeakValueDictionary()


def update_scales(recipe: Fp8Recipe, roles: slice) -> None:
    """Compute the next scales of all layers, from the largest numbers of all ranks that share them."""
    if not (states := list(_STATES.values())):
        return
    amax = torch.stack([state.history[0, roles] for state in states])
    if recipe.group is not None and recipe.group.size() > 1:
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=recipe.group)
    for state, largest in zip(states, amax, strict=True):
        state.update(roles, largest, recipe)
