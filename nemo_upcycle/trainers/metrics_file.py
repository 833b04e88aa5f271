"""The file `metrics.jsonl` of a training: one line of JSON per step, validation or event."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nemo_upcycle.utils.files import whole_file


METRICS = "metrics.jsonl"


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


def keep_until(path: Path, step: int) -> None:
    """Delete the lines of later steps, which a resumed or rewound training will repeat, and lines that are cut off."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with whole_file(path) as aside:
            aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for a line that a full disk cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
