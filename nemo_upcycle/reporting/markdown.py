"""Markdown and number formats of the report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """Return a Markdown table: the first column aligned left, the others right if they hold `numbers`.

    Example:
        >>> print(table(["stage", "s"], [["import", "3"]]))
        | stage | s |
        |---|---:|
        | import | 3 |
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def section(title: str, *parts: str) -> str:
    """Return a section: its heading and its parts, without the empty ones.

    Example:
        >>> section("Training", "3 steps.", "")
        '## Training\\n\\n3 steps.'
    """
    return "\n\n".join(filter(None, [f"## {title}", *parts]))


def sources(*files: str) -> str:
    """Return the line that names the files of a section's numbers.

    Example:
        >>> sources("receipt.json", "pretrain/receipt.json")
        'Sources: `receipt.json`, `pretrain/receipt.json`.'
    """
    return f"Sources: {', '.join(f'`{file}`' for file in files)}."


def plain_cell(text: str) -> str:
    """Return a text on one line, escaped so that Markdown shows it as it is, also inside a table.

    Example:
        >>> print(plain_cell("one | <b>two</b>\\n*three*"))
        one \\| \\<b\\>two\\</b\\> \\*three\\*
    """
    return re.sub(r"([\\`*_\[\]<>|#$&~])", r"\\\1", " ".join(text.split()))


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with some significant digits, or a dash.

    Example:
        >>> number(0.000012345), number(1234567.0, 3), number(None)
        ('1.234e-05', '1.23e+06', '-')
    """
    return "-" if value is None else f"{value:.{digits}g}"


def with_error(value: float | None, stderr: float | None) -> str:
    """Return a value and its standard error, rounded to two digits of the error.

    Example:
        >>> with_error(1.12345, 0.0288), with_error(0.35, 0.0), with_error(12.0, None)
        ('1.123 ± 0.029', '0.35 ± 0', '12')
    """
    if value is None or not stderr:
        return f"{number(value)} ± 0" if value is not None and stderr == 0 else number(value)
    decimals = max(0, 1 - _exponent(stderr))
    if decimals > 6:
        return f"{number(value)} ± {number(stderr, 2)}"
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def millions(count: float) -> str:
    """Return a count in millions or billions.

    Example:
        >>> millions(134515008), millions(8030261248)
        ('134.5M', '8.03B')
    """
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def label(metric: str) -> str:
    """Return a metric in words, with its task.

    Example:
        >>> label("mmlu/acc")
        'acc (mmlu)'
    """
    task, _, name = metric.rpartition("/")
    return f"{name.replace('_', ' ')} ({task})"
