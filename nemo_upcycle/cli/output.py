"""Standard output and standard error of a command: what cannot be written there ends no work."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any


class _Forgiving(io.RawIOBase):
    """A file that keeps its first error in place of raising it, and drops what comes after."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return os.write(self._descriptor, data)
            except OSError as error:
                self.error = error
        return len(data)


class Output:
    """The standard output of a command.

    Args:
        raw: its file; None where another program has taken the output.
    """

    def __init__(self, raw: _Forgiving | None = None) -> None:
        self._raw = raw

    def problem(self) -> str | None:
        """Return why not all could be written; None if it could, and for a reader that wants no more (`| head`)."""
        sys.stdout.flush()
        error = self._raw.error if self._raw else None
        return error.strerror if error and error.errno != errno.EPIPE else None


def take_output() -> Output:
    """Prepare the streams: closed ones, readers that go, full disks, and characters that the terminal lacks."""
    output = Output()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            raw = _Forgiving(stream.fileno())
            buffer: Any = io.BufferedWriter(raw)
            line = stream.line_buffering or stream.write_through
            text = io.TextIOWrapper(buffer, stream.encoding, errors="backslashreplace", line_buffering=line)
            setattr(sys, name, text)
            output = Output(raw) if name == "stdout" else output
    return output
