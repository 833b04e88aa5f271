"""Keep known messages of libraries off the console: a newcomer takes them for faults. They go to a file."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


#: Messages about optional parts, and lines that only frame others.
KNOWN = re.compile(
    r"transformer_engine not installed|module could not be imported|No Buildables found in value passed"
    r"|^\s*-{20,}\s*$|^distributed_backend=|All distributed processes registered|^`Trainer[(.]"
)


class Sieve:
    """A stream that writes known messages to a file, and all else to another stream.

    Args:
        stream: gets what is not known.
        log: the file; made with its first message.
    """

    def __init__(self, stream: TextIO, log: Path) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Write a message, whose lines are judged one by one; what follows an unknown line stays with it."""
        shown = "".join(line for line in text.splitlines(keepends=True) if not KNOWN.search(line.rstrip()))
        if shown != text:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                log.write(text)
        if shown.strip() or shown == text:
            self._stream.write(shown)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def sifted(log: Path) -> Iterator[None]:
    """Write known messages that the block's libraries print on stderr to a file.

    Args:
        log: the file.
    """
    before = sys.stderr
    sys.stderr = Sieve(before, log)
    try:
        yield
    finally:
        sys.stderr = before
