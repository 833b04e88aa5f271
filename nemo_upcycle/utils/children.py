"""SIGTERM in the processes that a training forks (data loaders, checkpoint writers)."""

from __future__ import annotations

import os
import signal
import threading
from functools import cache


@cache
def shield_children() -> None:
    """Make future child processes ignore SIGTERM unless their parent process sends it.

    A scheduler sends SIGTERM to all processes of a job. A training that saves a checkpoint before it ends needs its
    data loaders until the end. If a loader dies, torch raises an error before anything is saved.
    """
    os.register_at_fork(after_in_child=_obey_only_the_parent)


def _obey_only_the_parent() -> None:
    # The signal is blocked, because torch replaces a handler when a data loader starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parents_word, daemon=True).start()


def _end_with_the_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
