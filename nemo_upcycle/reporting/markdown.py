"""Sections and number formats of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard


#: Numbers from this size on are written with an exponent.
_LARGE = 1e7
#: Usual and largest number of an interval's significant digits. More digits show whether the interval contains 0.
_DIGITS, _MOST_DIGITS = 2, 8


def section(title: str, *parts: str) -> str:
    """Return a section: its heading and its non-empty parts.

    Example:
        >>> section("Training", "3 steps.", "")
        '## Training\\n\\n3 steps.'
    """
    return "\n\n".join(filter(None, [f"## {title}", *parts]))


def sources(*files: str) -> str:
    """Return the line that names the files from which a section's numbers come.

    Example:
        >>> sources("receipt.json", "pretrain/receipt.json")
        'Sources: `receipt.json`, `pretrain/receipt.json`.'
    """
    return f"Sources: {', '.join(f'`{file}`' for file in files)}."


def number(value: float | None, digits: int = 4) -> str:
    """Format a number with some significant digits; None as a dash.

    Example:
        >>> number(0.000012345), number(1234567.0, 3), number(None)
        ('1.234e-05', '1.23e+06', '-')
    """
    if value is None or not _is_number(value):  # a value from a file may have any type
        return "-" if value is None else "not a number"
    return f"{value:.{digits}g}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)


def with_half(value: float | None, half: float | None) -> str:
    """Format a value and half of its 95 % interval, both rounded to two significant digits of the half.

    More digits are printed if two digits do not show whether the interval contains 0, so that the text agrees with the
    verdict.

    Example:
        >>> with_half(1.12345, 0.0288), with_half(0.35, 0.0), with_half(12.0, None), with_half(-0.114, 0.112)
        ('1.123 ± 0.029', '0.35 ± 0', '12', '-0.114 ± 0.112')
    """
    if not _is_number(value) or not _is_number(half) or not math.isfinite(half) or not half:
        return f"{number(value)} ± 0" if value is not None and half == 0 else number(value)
    for digits in range(_DIGITS, _MOST_DIGITS):
        texts = _rounded(value, half, digits)
        if (abs(float(texts[0])) > float(texts[1])) == (abs(value) > half):
            break
    return " ± ".join(texts)


def _rounded(value: float, half: float, digits: int) -> tuple[str, str]:
    """Round half of an interval to some significant digits, and the value to the same decimals."""
    decimals = max(0, digits - 1 - int(f"{half:e}".partition("e")[2]))
    if decimals > 6 or abs(value) >= _LARGE:
        return number(value, digits + 2), number(half, digits)
    return f"{value:.{decimals}f}", f"{half:.{decimals}f}"


def difference(found: Mapping[str, Any]) -> str:
    """Format a difference with its sign, and half of its interval (`low` to `high`).

    Example:
        >>> difference({"difference": 0.35, "low": 0.339, "high": 0.361})
        '+0.350 ± 0.011'
    """
    value, half = found["difference"], _half(found)
    return f"{'+' if value > 0 else ''}{with_half(value, half)}"


def mean_with_interval(mean: Mapping[str, Any]) -> str:
    """Format a result of `with_interval` or `mean_of`, with half of its interval if there is one."""
    return with_half(mean["value"], _half(mean))


def _half(found: Mapping[str, Any]) -> float | None:
    return None if found["low"] is None else (found["high"] - found["low"]) / 2


def with_verdict(point: Mapping[str, Any] | None) -> str:
    """Format a result of `judge`, with half of its interval and the verdict; None as a dash."""
    return "-" if point is None else f"{difference(point)} ({point['verdict']})"


def millions(count: float) -> str:
    """Format a count in millions or billions.

    Example:
        >>> millions(134515008), millions(8030261248)
        ('134.5M', '8.03B')
    """
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def label(metric: str) -> str:
    """Return a metric's name in words, with its task.

    Example:
        >>> label("mmlu/acc")
        'acc (mmlu)'
    """
    task, _, name = metric.rpartition("/")
    return f"{name.replace('_', ' ')} ({task})"
