"""The planner's table: which columns there are, and which of them a terminal has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning.memory import GIB
from nemo_upcycle.planning.search import Plan


#: Header -> the text of a plan's cell, in the order of the table.
_CELLS: dict[str, Callable[[Plan], str]] = {
    "layout": lambda plan: plan.layout.sizes,
    "dp": lambda plan: str(plan.layout.dp),
    "recompute": lambda plan: plan.work.recompute,
    "weights": lambda plan: _gib(plan.memory.weights),
    "grads": lambda plan: _gib(plan.memory.gradients),
    "optim": lambda plan: _gib(plan.memory.optimizer),
    "fp8": lambda plan: _gib(plan.memory.fp8_copies),
    "activ": lambda plan: _gib(plan.memory.activations),
    "routed": lambda plan: _gib(plan.memory.routed),
    "logits": lambda plan: _gib(plan.memory.logits),
    "other": lambda plan: _gib(plan.memory.workspace),
    "GiB": lambda plan: _gib(plan.memory.total),
    "card": lambda plan: f"{100 * plan.memory.total / GIB / plan.request.gpu.memory_gib:.0f}%",
    "fits": lambda plan: plan.verdict,
    "tok/s": lambda plan: f"{plan.tokens_per_s_per_gpu:.0f}",
    "TFLOP/s": lambda plan: f"{plan.tflops_per_gpu(causal=False):.0f}",
    "MFU": lambda plan: f"{100 * plan.mfu:.1f}%",
    "bound-by": lambda plan: plan.time.bound_by,
    "hours": lambda plan: f"{plan.hours:.1f}",
    "GPU-hours": lambda plan: f"{plan.gpu_hours:.0f}",
}
_COST = "cost"
COLUMNS = (*_CELLS, _COST)
_LEFT = ("layout", "recompute", "fits", "bound-by")
#: What a narrow table has, the most important first; the others follow in their order.
_IMPORTANT = ("layout", "fits", "tok/s", "hours", _COST, "GiB", "recompute", "MFU", "card", "GPU-hours", "TFLOP/s")


def named_columns(text: str) -> list[str]:
    """Return the columns that a text such as `GiB,MFU` names, after the layout; capitals do not matter.

    Raises:
        SpecError: there is none of that name.
    """
    known = {name.lower(): name for name in COLUMNS}
    names = text.replace(",", " ").split()
    for name in names:
        if name.lower() not in known:
            raise SpecError.unknown("column", name.lower(), known)
    return list(dict.fromkeys(["layout", *(known[name.lower()] for name in names)]))


def table_text(
    plans: list[Plan], price: float | None, names: list[str] | None, width: int | None
) -> tuple[str, list[str]]:
    """Return plans as a table, and the columns that it has no room for.

    Args:
        plans: a row each.
        price: of a GPU-hour.
        names: the columns; None chooses.
        width: of the terminal; None for all columns.
    """
    every = [name for name in COLUMNS if name != _COST or price is not None]
    columns = {name: [name, *(_cell(plan, name, price) for plan in plans)] for name in names or every}
    if names is None and width is not None:
        kept = _that_fit({name: max(map(len, cells)) for name, cells in columns.items()}, width - len("##"))
    else:
        kept = set(columns)
    shown = {"#": ["#", *map(str, range(1, len(plans) + 1))]}
    shown |= {name: cells for name, cells in columns.items() if name in kept}
    padded = (_padded(cells, left=name in _LEFT) for name, cells in shown.items())
    text = "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))
    return text, [name for name in columns if name not in kept]


def _that_fit(widths: dict[str, int], room: int) -> set[str]:
    """Return the most important columns, as many as there is room for; layout and verdict in any case."""
    kept: set[str] = set()
    for name in dict.fromkeys([*_IMPORTANT, *widths]):
        if name in widths:
            room -= widths[name] + len("  ")
            if room < 0 and name not in ("layout", "fits"):
                break
            kept.add(name)
    return kept


def _cell(plan: Plan, name: str, price: float | None) -> str:
    if name == _COST:
        return "-" if price is None else f"{plan.gpu_hours * price:.0f}"
    return _CELLS[name](plan)


def _padded(cells: Iterable[str], *, left: bool) -> list[str]:
    texts = list(cells)
    width = max(map(len, texts))
    return [text.ljust(width) if left else text.rjust(width) for text in texts]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
