"""Lock files, so that one process at a time writes what lies beside them. The lock ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any


_POLL_S = 0.05


def take_lock(path: Path, timeout_s: float = 0) -> AbstractContextManager[Any]:
    """Lock a file for this process, until the returned context or the process ends, even by `kill -9`.

    Some network file systems have no locks: avoiding two writers is then the user's responsibility.

    Args:
        path: the file, which is created.
        timeout_s: how long to wait for another process that holds the lock; -1 waits for its end.

    Raises:
        TimeoutError: another process holds the lock.
    """
    begun = time.monotonic()
    while not (lock := _lock_now(path)):
        if 0 <= timeout_s <= time.monotonic() - begun:
            raise TimeoutError(f"another process holds {path}")
        time.sleep(_POLL_S)
    return lock


def _lock_now(path: Path) -> ExitStack | None:
    """Lock a file; None if another process holds the lock, or deleted the file while this one opened it."""
    with ExitStack() as lock:
        handle = lock.enter_context(path.open("ab"))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.callback(fcntl.flock, handle, fcntl.LOCK_UN)  # processes forked meanwhile have the file open, too
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        return lock.pop_all() if os.fstat(handle.fileno()).st_nlink else None
