"""What earlier releases had: a setting that does nothing is read over, one that does something is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import SpecError


#: Last words of the names of the settings: the first says how much, the others how.
_TEACHER = ("teacher_weight", "teacher_temperature")


def without_teacher(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the settings of a parent that teaches (docs/tuning.md), where its weight is 0.

    Args:
        values: settings by their names, as they are or as text.

    Raises:
        SpecError: it has a weight.

    Example:
        >>> without_teacher({"data.seed": 1, "data.teacher_weight": "0.0", "data.teacher_temperature": 2.0})
        {'data.seed': 1}
    """
    for name, value in values.items():
        if name.endswith(_TEACHER[0]) and str(value) not in ("0", "0.0", "None", "null"):
            raise SpecError.removed(name.rpartition(" ")[2], value)
    return {name: value for name, value in values.items() if not name.endswith(_TEACHER)}
