"""`take_lock` admits one process at a time, and the lock ends with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.utils.locks import take_lock


def _holder(path: Path) -> subprocess.Popen[str]:
    """Start a process that holds a lock until it is killed."""
    code = (
        "import signal, sys\nfrom pathlib import Path\nfrom nemo_upcycle.utils.locks import take_lock\n"
        "with take_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    signal.pause()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with _holder(path) as holder:
        with pytest.raises(TimeoutError, match="another process holds"):
            take_lock(path)
        holder.send_signal(signal.SIGKILL)
    with take_lock(path):
        pass


def test_waits_for_the_end_of_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with _holder(path) as holder:
        holder.send_signal(signal.SIGKILL)
        with take_lock(path, timeout_s=-1):
            pass


def test_a_forked_child_does_not_keep_a_released_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with take_lock(path):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with take_lock(path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_deleted_file_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and lock, another process may finish the folder and delete the folder's lock."""
    path, opened = tmp_path / "lock", Path.open

    def open_and_delete(self: Path, mode: str) -> object:
        monkeypatch.undo()
        handle = opened(self, mode)
        self.unlink()
        return handle

    monkeypatch.setattr(Path, "open", open_and_delete)
    with take_lock(path, timeout_s=-1):
        assert path.exists()
