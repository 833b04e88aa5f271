"""Progress display: a bar with an ETA on a terminal, otherwise a line every few seconds (logs, CI, Slurm)."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


logger = logging.getLogger(__name__)
T = TypeVar("T")
_LINE_EVERY_S = 5.0


def duration(seconds: float) -> str:
    """Format seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressLine:
    """A progress display on stderr.

    Args:
        label: name of the work, for example `upcycle`.
        total: number of units (parameters, bytes, steps).
        enabled: whether to show progress; False on every rank except the first.

    Example:
        >>> with ProgressLine("export", total=10) as line:  # doctest: +SKIP
        ...     line.advance()
    """

    def __init__(self, label: str, total: int, *, enabled: bool = True) -> None:
        self.label, self.total, self.enabled = label, total, enabled
        self._done, self._start_s = 0, time.monotonic()
        self._last_line_s = self._start_s
        self._bar: Progress | None = None
        if enabled and getattr(sys.stderr, "isatty", bool)():  # NeMo-Run may install a stream without `isatty`
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(label, total=total, note="")

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self.enabled and self._last_line_s > self._start_s:
            self._write("")

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more units as done; `note` is shown after the ETA."""
        self._done += amount
        self.total = max(self.total, self._done)  # the total may be an estimate that was too low
        if self._bar:
            self._bar.update(self._task, advance=amount, total=self.total, note=note)
        elif self.enabled and time.monotonic() - self._last_line_s >= _LINE_EVERY_S:
            self._write(note)

    def _write(self, note: str) -> None:
        now_s = self._last_line_s = time.monotonic()
        elapsed_s = now_s - self._start_s
        left_s = elapsed_s / max(self._done, 1) * (self.total - self._done)
        share = 100 * self._done / max(self.total, 1)
        text = f"{self.label}: {self._done}/{self.total} ({share:.0f}%)  {duration(elapsed_s)}  ETA {duration(left_s)}"
        sys.stderr.write(f"{text}  {note}".rstrip() + "\n")
        sys.stderr.flush()


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield `items`, and report one unit of progress after each item."""
    with ProgressLine(label, total) as line:
        for item in items:
            yield item
            line.advance()


def show_messages() -> logging.Logger:
    """Show the package's messages on the console, and return its logger."""
    package = logging.getLogger("nemo_upcycle")
    if not package.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False
    return package
