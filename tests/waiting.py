"""Waits that end with what they wait for. No test asserts how long anything takes; `benchmarks/` measures that."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar


T = TypeVar("T")
#: A limit against hanging alone, for waits and processes: far above what a slow and busy machine needs.
HANG_S = 900.0


def wait_until(
    found: Callable[[], T],
    process: subprocess.Popen | None = None,
    said: Callable[[], str] = str,
    *,
    poll_s: float = 0.05,
) -> T:
    """Wait until something is there, and return it.

    Args:
        found: what is looked for; done when it is true.
        process: what makes it, which must not end before.
        said: what to show where it ended, or hangs.
        poll_s: how often is looked.
    """
    deadline_s = time.monotonic() + HANG_S
    while not (value := found()):
        assert process is None or process.poll() is None, f"it ended with {process.returncode}\n{said()}"
        assert time.monotonic() < deadline_s, f"it hangs\n{said()}"
        time.sleep(poll_s)
    return value
