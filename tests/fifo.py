"""A named pipe that blocks a process when it reads a file."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from tests.waiting import wait_until


@contextlib.contextmanager
def held_by_reader(path: Path) -> Iterator[None]:
    """Wait until a process opens the pipe for reading, and keep the process waiting for data until the block ends."""
    (descriptor,) = wait_until(lambda: _opened(path))
    try:
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> tuple[int, ...]:
    try:
        return (os.open(path, os.O_WRONLY | os.O_NONBLOCK),)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return ()
