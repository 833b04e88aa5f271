"""A console for progress and results: libraries' messages appear only on request, and the process ends without delay.

The module also formats text for the terminal: columns, folded lines and short numbers.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


#: Loggers of the libraries used for training.
LIBRARIES = ("megatron", "lightning.pytorch", "lightning.fabric", "nv_one_logger", "NeMo", "torch.utils.cpp_extension")


def is_verbose() -> bool:
    """Return whether the user asked for the libraries' messages with NEMO_UPCYCLE_VERBOSE=1."""
    return bool(os.environ.get("NEMO_UPCYCLE_VERBOSE"))


def in_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Align rows in columns, two blanks apart; align the columns whose numbers are in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def terminal_width() -> int:
    """Return the terminal's width (characters); 80 without a terminal."""
    return shutil.get_terminal_size().columns


def folded(text: str) -> str:
    """Break lines between words at the terminal's width; indent continuation lines by two blanks."""
    fill = textwrap.TextWrapper(
        terminal_width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ).fill
    return "\n".join(map(fill, text.split("\n")))


def end_soon() -> None:
    """Make Python skip the objects of NeMo's import at exit, because collecting them takes seconds.

    If Triton is loaded (PyTorch loads it for GPUs), nothing is skipped, because Triton's nanobind would report every
    object that is not freed as a leak.
    """
    if "triton._C.libtriton" not in sys.modules:
        gc.freeze()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector while large libraries are imported, to make the import seconds faster."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # marks all objects as old, because old objects are scanned later
        if was_on:
            gc.enable()


def quiet_libraries() -> None:
    """Hide warnings, and all messages of the libraries' loggers except errors."""
    warnings.filterwarnings("ignore")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def short_count(number: float) -> str:
    """Return a number with three digits and a unit.

    Example:
        >>> short_count(8_030_261_248), short_count(15e12), short_count(6144)
        ('8.03B', '15T', '6,144')
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"
