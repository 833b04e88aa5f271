"""Let a process kill itself (`kill -9`) at a chosen moment, for example when it opens a path for the n-th time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Strike:
    """The moment at which a process is killed.

    Args:
        event: Python audit event that names a path: `open`, `os.rename`, `os.remove`; "" to use only `delay_s`.
        where: part of the path.
        count: number of the event; the kill comes before this event happens.
        inside_removal: count events only after the removal of a folder under `where` has begun, whatever their path.
        delay_s: delay (s) after `arm`; used only if there is no event.
        rank: rank to kill; other ranks fail by themselves, or are killed by the process that waits for them.

    Example:
        >>> Strike("open", ".distcp", count=2)  # while the second file of the first checkpoint is written
        Strike(event='open', where='.distcp', count=2, inside_removal=False, delay_s=0.0, rank=0)
    """

    event: str = ""
    where: str = ""
    count: int = 1
    inside_removal: bool = False
    delay_s: float = 0.0
    rank: int = 0


def arm(strike: Strike) -> None:
    """Kill this process when the moment comes in this process or in a fork of it; the fork is killed, too."""
    if int(os.environ.get("RANK", "0")) != strike.rank:
        return
    victim, seen, removing = os.getpid(), 0, not strike.inside_removal

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if not strike.event:
        timer = threading.Timer(strike.delay_s, kill)
        timer.daemon = True
        timer.start()
        return

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, removing
        if event == "shutil.rmtree" and strike.where in str(arguments[0]):
            removing = True
        elif event == strike.event and removing:
            named = strike.inside_removal or any(strike.where in str(part) for part in arguments[:2])
            seen += named
            if named and seen == strike.count:
                kill()

    sys.addaudithook(watch)
