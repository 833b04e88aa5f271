"""End every process of the engine when its parent ends; otherwise datatrove's workers would continue to write."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path


_PR_SET_PDEATHSIG = 1
_started_by = [0]


def stop_with_parent() -> None:
    """Make this process get SIGTERM when its parent `nemo-upcycle data` ends, even by `kill -9`.

    The end of a shell has no effect, so an engine that was started under nohup continues.
    """
    parent = os.getppid()
    if not sys.platform.startswith("linux") or not _is_python(parent):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent ended meanwhile
        signal.raise_signal(signal.SIGTERM)


def _is_python(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.startswith("python")
    except OSError:  # a process of another user, as under sudo
        return False


def die_with_parent() -> None:
    """Make every forked process, and the processes forked from it, die when its parent ends, even by `kill -9`."""
    if sys.platform.startswith("linux"):
        os.register_at_fork(before=_remember_parent, after_in_child=_ask_for_signal)


def _remember_parent() -> None:
    _started_by[0] = os.getpid()


def _ask_for_signal() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != _started_by[0]:  # the parent ended meanwhile
        os._exit(1)
