"""Which single change makes a plan faster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.rules import first_violation, with_size
from nemo_upcycle.planning.search import Plan, PlanRequest, evaluate_layout
from nemo_upcycle.planning.workload import PRECISIONS


#: Of speed; differences below it are within the error of the predictions (docs/planning.md).
_LEAST_PERCENT = 5
#: Field of a layout -> kind of its change; `sizes` for fields that are not here.
_KINDS = {"pp": "stages", "vp": "stages", "micro_batch": "micro-batch"}


class Change(NamedTuple):
    """A plan that differs from another in one setting.

    Args:
        kind: kind of the change: parallel sizes, stages, micro-batch, precision or recomputation.
        text: the setting, as `nemo-upcycle plan` takes it.
        plan: plan with the change.
        percent: the speed that it adds.
    """

    kind: str
    text: str
    plan: Plan
    percent: float


def best_changes(plan: Plan, has_settings: Callable[[Plan], bool]) -> list[Change]:
    """Return of each kind the single change that makes a plan fastest, and still fits; the one that adds most first.

    Left out is what adds less than the model is usually wrong by.

    Args:
        plan: plan to change.
        has_settings: whether a changed plan can be run.
    """
    best: dict[str, Change] = {}
    for change in _single_changes(plan) if plan.verdict != "no" else ():
        if change.percent >= _LEAST_PERCENT and has_settings(change.plan):
            best[change.kind] = max(best.get(change.kind, change), change, key=lambda one: one.percent)
    return sorted(best.values(), key=lambda change: -change.percent)


def _single_changes(plan: Plan) -> Iterator[Change]:
    """Yield the changes that fit: a size doubled or halved, another precision, the planner's recomputation."""
    request, layout = plan.request, plan.layout
    changes: list[tuple[str, str, PlanRequest, Layout]] = []
    for key in ("tp", "pp", "vp", "cp", "ep", "etp", "micro_batch"):
        now, name = getattr(layout, key), "mbs" if key == "micro_batch" else key
        for value in (2 * now, max(1, now // 2)):
            changed = with_size(layout, request.work, key, value)[0]
            changes.append((_KINDS.get(key, "sizes"), f"{name}={value}", request, changed))
    for precision in (name for name, numbers in PRECISIONS.items() if request.gpu.has(numbers)):
        work = replace(request.work, precision=precision)
        changes.append(("precision", f"--precision {precision}", replace(request, work=work), layout))
    changes.append(("recomputation", "no --recompute", replace(request, recompute=None), layout))
    for kind, text, asked, other in changes:
        # Not every precision has every recomputation.
        with contextlib.suppress(SpecError):
            allowed = first_violation(other, asked.arch, asked.work) is None
            if allowed and (found := evaluate_layout(asked, other)).verdict == "fits":
                percent = round(100 * (found.tokens_per_s_per_gpu / plan.tokens_per_s_per_gpu - 1), 1)
                yield Change(kind, text, found, percent)
