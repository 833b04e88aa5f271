"""Waits that end as soon as a condition holds. No test asserts a duration; `benchmarks/` measures durations."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar


T = TypeVar("T")
#: Time limit (s) of waits and processes. Even a slow, busy machine needs far less, unless something hangs.
HANG_S = 900.0


def wait_until(
    found: Callable[[], T],
    process: subprocess.Popen | None = None,
    said: Callable[[], str] = str,
    *,
    poll_s: float = 0.05,
) -> T:
    """Wait until a condition holds, and return its value.

    Args:
        found: condition to poll; the first true value ends the wait.
        process: process that must not end before the condition holds.
        said: text to show if the process ends or the wait hangs.
        poll_s: polling interval (s).
    """
    deadline_s = time.monotonic() + HANG_S
    while not (value := found()):
        assert process is None or process.poll() is None, f"it ended with {process.returncode}\n{said()}"
        assert time.monotonic() < deadline_s, f"it hangs\n{said()}"
        time.sleep(poll_s)
    return value
