"""Limits that end a training: unused experts, dropped tokens, and a loss above the parent's."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.trainers.metrics_file import METRICS
from nemo_upcycle.utils.validation import check_number, check_whole


@dataclass(frozen=True)
class StopReason:
    """Why a training ends.

    Args:
        what: the number that ended the training, in words.
        got: value of this number.
        expected: values that let the training continue.
        first_step: first step at which the number was wrong.
        last_step: step at which the training ends.
        is_balance: whether experts are used unevenly, so that stronger balancing helps.
    """

    what: str
    got: float
    expected: str
    first_step: int
    last_step: int
    is_balance: bool = False


@dataclass(frozen=True)
class StopLimits:
    """Limits of a training; a limit that is exceeded at `limit_steps` steps in a row ends the training.

    Args:
        min_expert_load: smallest load that any expert must have; 1 is a balanced load. None: no limit.
        max_dropped: largest share of a layer's token slots that may be dropped (0 to 1). None: no limit.
        max_above_parent: how much the loss may exceed the parent's loss (nats per token). None: no limit. The parent's
            loss is the validation loss before the first step, or the loss of the first step if there is none.
        limit_steps: number of steps in a row.
    """

    min_expert_load: float | None = None
    max_dropped: float | None = None
    max_above_parent: float | None = None
    limit_steps: int = 100

    @property
    def are_set(self) -> bool:
        """Whether there is any limit."""
        return any(one is not None for one in (self.min_expert_load, self.max_dropped, self.max_above_parent))

    def check(self) -> None:
        """Check the values.

        Raises:
            SpecError: a value is out of range.
        """
        for name, high in (("min_expert_load", 1.0), ("max_dropped", 1.0), ("max_above_parent", math.inf)):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, 0.0, high)
        check_whole("limit_steps", self.limit_steps, 1)


class LimitWatch:
    """Compares each step of a training with the limits, on the first rank. A new start counts steps from 0.

    Args:
        limits: the limits.
        folder: folder of the training, whose metrics hold the parent's loss.

    Example:
        >>> watch = LimitWatch(StopLimits(max_dropped=0.1, limit_steps=2), Path("pretrain"))
        >>> watch.add({"step": 8, "router": {"dropped": [0.25]}})
        >>> watch.add({"step": 9, "router": {"dropped": [0.5]}})
        StopReason(what='share of dropped tokens', got=0.5, expected='at most 0.1 ...', first_step=8, ...)
    """

    def __init__(self, limits: StopLimits, folder: Path) -> None:
        self._limits, self._folder = limits, folder
        self._begun: dict[str, int] = {}
        self._parent: float | None = None

    def add(self, line: dict[str, Any]) -> StopReason | None:
        """Compare a step with the limits.

        Args:
            line: line of the step in `metrics.jsonl`.

        Returns:
            The reason to end the training; None to continue.
        """
        step, limits = line["step"], self._limits
        for what, got, limit, is_least in self._compared(line):
            if (got >= limit) if is_least else (got <= limit):
                self._begun.pop(what, None)
                continue
            first = self._begun.setdefault(what, step)
            if step - first + 1 >= limits.limit_steps:
                expected = (
                    f"at {'least' if is_least else 'most'} {limit:g} in one of the last {limits.limit_steps} steps"
                )
                return StopReason(what, got, expected, first, step, is_balance=what != "loss")
        return None

    def _compared(self, line: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
        """Return a step's numbers that have a limit: name, value, limit, and whether the limit is the least value."""
        limits, found = self._limits, list[tuple[str, float, float, bool]]()
        loads = [min(row) * len(row) for row in line.get("expert_load", ()) if any(row)]
        if limits.min_expert_load is not None and loads:
            found.append(("load of an expert", min(loads), limits.min_expert_load, True))
        dropped = [share for share in line.get("router", {}).get("dropped", ()) if share is not None]
        if limits.max_dropped is not None and dropped:
            found.append(("share of dropped tokens", max(dropped), limits.max_dropped, False))
        if limits.max_above_parent is not None and line.get("loss") is not None:
            found.append(("loss", line["loss"], self._parent_loss() + limits.max_above_parent, False))
        return found

    def _parent_loss(self) -> float:
        if self._parent is None:
            lines = map(json.loads, (self._folder / METRICS).read_text(encoding="utf-8").splitlines())
            known = [line for line in lines if {"loss", "validation_loss"} & line.keys()]
            first = next((line for line in known if line["step"] == 0), known[0])
            self._parent = first["validation_loss"] if first["step"] == 0 else first["loss"]
        return self._parent
