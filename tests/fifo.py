"""A named pipe that holds a process where it reads a file."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def held_by_reader(path: Path, timeout_s: float = 120.0) -> Iterator[None]:
    """Wait until a process opens the pipe to read it; it reads nothing until the block ends.

    Raises:
        OSError: nobody opens it in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        os.close(descriptor)
