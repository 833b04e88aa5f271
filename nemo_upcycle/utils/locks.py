"""Lock files that let only one process at a time write the files beside them. The lock ends with its process."""

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
    """Lock a file for this process until the returned context or the process ends.

    The lock ends with the process even after `kill -9`. Some network file systems have no locks. On such file systems,
    users must make sure that only one process writes.

    Args:
        path: lock file; it is created if missing.
        timeout_s: longest wait for another process that holds the lock (seconds); -1 waits without a limit.

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
    """Lock a file now; return None if another process holds the lock or has just deleted the file."""
    with ExitStack() as lock:
        handle = lock.enter_context(path.open("ab"))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.callback(fcntl.flock, handle, fcntl.LOCK_UN)  # forked processes keep the file open
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        return lock.pop_all() if os.fstat(handle.fileno()).st_nlink else None
