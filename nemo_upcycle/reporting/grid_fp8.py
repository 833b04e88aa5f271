"""What emulated FP8 lost in the trainings of a grid: numbers that became zero, and numbers that were cut."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nemo_upcycle.reporting.markdown import number, section, table


_OPERANDS = ("input", "weight", "gradient")


def compare_fp8(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Return what FP8 lost, of each arm that trained in it.

    Args:
        evidence: what `collect_evidence` or `read_evidence` returned.

    Returns:
        arm -> operand -> `amax`, the largest number of all steps and seeds; shares of an operand's numbers but zeros:
        `underflow_first`, of the first step that became zero, and `underflow_later`, of the others, means over steps
        and seeds; `saturated_first`, of the first step that was cut, and `saturated_later`, of the worst later one.
    """
    cells: dict[str, list[Mapping[str, list[float]]]] = defaultdict(list)
    for cell, about in evidence["described"]["cells"].items():
        if losses := evidence["cells"][cell].get("fp8"):
            cells[about["arm"]].append(losses)
    return {arm: {operand: _losses(seeds, operand) for operand in _OPERANDS} for arm, seeds in cells.items()}


def _losses(seeds: list[Mapping[str, list[float]]], operand: str) -> dict[str, float]:
    def over(name: str, reduce: Callable[[Iterable[float]], float], steps: slice) -> float:
        numbers = [value for losses in seeds for value in losses[f"{operand}/{name}"][steps]]
        return float(f"{reduce(numbers):.6g}") if numbers else 0.0

    first, later = slice(0, 1), slice(1, None)
    return {
        "amax": over("amax", max, slice(None)),
        "underflow_first": over("underflow", statistics.fmean, first),
        "underflow_later": over("underflow", statistics.fmean, later),
        "saturated_first": over("saturated", max, first),
        "saturated_later": over("saturated", max, later),
    }


def fp8_section(arms: Mapping[str, Any]) -> str:
    """Return the table of what `compare_fp8` found; "" where no arm trained in FP8."""
    if not arms:
        return ""

    def cell(losses: Mapping[str, Any], key: str, factor: float, digits: int) -> str:
        return " / ".join(number(factor * losses[operand][key], digits) for operand in _OPERANDS)

    rows = [
        [
            arm,
            cell(losses, "amax", 1, 3),
            *(cell(losses, f"underflow_{when}", 100, 2) for when in ("first", "later")),
            *(cell(losses, f"saturated_{when}", 1e6, 2) for when in ("first", "later")),
        ]
        for arm, losses in arms.items()
    ]
    header = ["of inputs / weights / gradients", "largest number", "zeroed in step 1, %", "later, %"]
    return section(
        "What FP8 lost",
        table([*header, "cut in step 1, of a million", "later, at most"], rows),
        "Of the numbers but zeros that linear layers quantised in a step: those that became zero (mean over steps and"
        " seeds), and those beyond the largest number of the type, which were cut (the worst step of all seeds).",
    )
