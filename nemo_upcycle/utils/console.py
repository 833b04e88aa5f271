"""Keep the console for progress and results: show the libraries' messages only on request, and end without delay."""

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


#: Loggers of the libraries that trainers use.
LIBRARIES = ("megatron", "lightning.pytorch", "lightning.fabric", "nv_one_logger", "NeMo", "torch.utils.cpp_extension")


def is_verbose() -> bool:
    """Return whether the user asked for the libraries' messages with NEMO_UPCYCLE_VERBOSE=1."""
    return bool(os.environ.get("NEMO_UPCYCLE_VERBOSE"))


def in_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return rows in columns two blanks apart; those in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def terminal_width() -> int:
    """Return how many characters a line of the terminal has; 80 without one."""
    return shutil.get_terminal_size().columns


def folded(text: str) -> str:
    """Break a text's lines at the terminal's width, but no word; what goes on is indented by two blanks."""
    fill = textwrap.TextWrapper(
        terminal_width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ).fill
    return "\n".join(map(fill, text.split("\n")))


def end_soon() -> None:
    """Let Python skip the objects of NeMo's import when this process ends: looking through them takes seconds.

    Not where Triton is loaded, by PyTorch for GPUs: its nanobind lists every object that is not freed as a leak.
    """
    if "triton._C.libtriton" not in sys.modules:
        gc.freeze()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Import large libraries without the garbage collector, which looks for seconds through all that they make."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # as old objects, which are not looked through at once
        if was_on:
            gc.enable()


def quiet_libraries() -> None:
    """Show only errors of the libraries on the console."""
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
