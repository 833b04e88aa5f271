"""Write known messages of libraries to a file instead of the console, because newcomers take them for faults."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


#: Messages about optional parts, and lines that only frame other messages.
KNOWN = re.compile(
    r"transformer_engine not installed|module could not be imported|No Buildables found in value passed"
    r"|^\s*-{20,}\s*$|^distributed_backend=|All distributed processes registered|^`Trainer[(.]"
)


class Sieve:
    """A stream that writes known messages to a file, and all other text to another stream.

    Args:
        stream: stream for all other text.
        log: file for known messages; it is created with the first message.
    """

    def __init__(self, stream: TextIO, log: Path) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Write a message without its known lines; if it has known lines, copy the whole message to the file."""
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
    """Redirect known messages on stderr to a file while the block runs.

    Args:
        log: file for known messages.
    """
    before = sys.stderr
    sys.stderr = Sieve(before, log)
    try:
        yield
    finally:
        sys.stderr = before
