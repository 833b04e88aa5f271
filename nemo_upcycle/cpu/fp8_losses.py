"""Measure what emulated FP8 loses in a step: the largest numbers, and the shares that become zero or are clipped."""

from __future__ import annotations

from typing import Any

import torch

from nemo_upcycle.cpu import fp8_recipe
from nemo_upcycle.cpu.fp8_quantize import Quantized


#: Maps a column of a layer's state to the name of the operand.
_ROLES = {fp8_recipe.INPUT: "input", fp8_recipe.WEIGHT: "weight", fp8_recipe.GRADIENT: "gradient"}


class Fp8Losses:
    """Counts the numbers that this rank's linear layers quantise in training; a `monitoring.step_metrics.Probe`.

    Recomputed layers are counted again, which changes no share. If an operand's scale follows from the operand's own
    numbers, no number is clipped. Only delayed scaling, where scales come from earlier passes, clips numbers.

    Example:
        >>> losses = watch_fp8(config)  # doctest: +SKIP
        >>> losses.describe(sum_over_ranks(losses.local()))["fp8"]["gradient"]  # doctest: +SKIP
        {'amax': 0.0123, 'underflow': 0.18, 'saturated': 0.0}
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(len(_ROLES), 3, dtype=torch.float64)  # numbers not zero, lost, clipped
        self._largest = torch.zeros(len(_ROLES), dtype=torch.float64)

    def count(self, role: int, x_RC: torch.Tensor, made: Quantized, *, has_own_scale: bool) -> None:
        """Count the numbers of an operand.

        Args:
            role: column of the operand in a layer's state.
            x_RC: numbers before quantisation, [R, C].
            made: the quantised operand.
            has_own_scale: whether the operand's scale follows from its own largest number.
        """
        if not x_RC.numel():
            return
        size, is_some = x_RC.detach().float().abs(), x_RC != 0
        lost = is_some & (made.data.float() == 0)
        most = torch.finfo(made.data.dtype).max * made.scale_inv.flatten()[0]
        cut = 0.0 if has_own_scale else float((size > most).sum())
        self._counts[role] += torch.tensor([float(is_some.sum()), float(lost.sum()), cut], dtype=torch.float64)
        self._largest[role] = max(self._largest[role], size.amax())

    def local(self) -> dict[str, torch.Tensor]:
        """Return this rank's counts since the last call, to be summed over all ranks."""
        largest = torch.zeros(torch.distributed.get_world_size(), len(_ROLES), dtype=torch.float64)
        largest[torch.distributed.get_rank()] = self._largest
        parts = {"fp8_counts": self._counts.clone(), "fp8_largest": largest}
        self._counts.zero_()
        self._largest.zero_()
        return parts

    def describe(self, summed: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return each operand's largest number, and the shares of its nonzero numbers that are lost or clipped."""
        found = {}
        for role, name in _ROLES.items():
            numbers, lost, cut = summed["fp8_counts"][role].tolist()
            shares = {"underflow": lost / max(numbers, 1.0), "saturated": cut / max(numbers, 1.0)}
            largest = float(summed["fp8_largest"][:, role].amax())
            found[name] = {key: float(f"{value:.6g}") for key, value in {"amax": largest, **shares}.items()}
        return {"fp8": found}
