"""Processes that a training forks: loaders of data, writers of checkpoints."""

from __future__ import annotations

import os
import signal
import threading
from functools import cache


@cache
def shield_children() -> None:
    """Let SIGTERM end a process that this one forks from now on only if this one sends it.

    A scheduler sends it to all processes of a job. A training that saves before it ends needs its loaders of data for
    that long: torch raises an error for one that dies, before anything is saved.
    """
    os.register_at_fork(after_in_child=_obey_only_the_parent)


def _obey_only_the_parent() -> None:
    # Blocked, and not handled: torch sets a handler of its own when a loader begins.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parents_word, daemon=True).start()


def _end_with_the_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
