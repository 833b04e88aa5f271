"""A queue in a folder: what forked checkpoint writers report, without a process that collects it."""

from __future__ import annotations

import pickle
import queue
import tempfile
import time
from pathlib import Path
from typing import Any


class FolderQueue:
    """Hands pickled values from this process and those it forks to this process, in the order of their arrival.

    Example:
        >>> reports = FolderQueue()
        >>> reports.put({0: "done"})
        >>> reports.get_nowait()
        {0: 'done'}
    """

    def __init__(self) -> None:
        self._owner = tempfile.TemporaryDirectory(prefix="nemo_upcycle_")
        self._folder = Path(self._owner.name)

    def put(self, value: Any) -> None:
        """Add a value."""
        aside = self._folder / f".{time.time_ns()}"
        aside.write_bytes(pickle.dumps(value))
        aside.rename(self._folder / aside.name[1:])

    def get_nowait(self) -> Any:
        """Take the oldest value.

        Raises:
            queue.Empty: there is none.
        """
        for path in sorted(self._folder.glob("[0-9]*")):
            value = pickle.loads(path.read_bytes())  # written by `put`, in a folder that only this user can enter
            path.unlink()
            return value
        raise queue.Empty
