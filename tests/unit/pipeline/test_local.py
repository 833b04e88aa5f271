"""The ranks of a stage on this machine are started, watched and ended. The tests use real processes without NeMo."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from nemo_upcycle.pipeline.executors import local
from tests.waiting import wait_until


def _run(code: str, ranks: int | None, folder: Path, stop: local.StopSignals) -> int:
    command = [sys.executable, "-c", f"import os, signal, subprocess, sys, time\n{code}", str(folder)]
    return local.run_ranks(command, ranks, {"MINE": "1"}, folder / "logs" / "stage", stop)


def processes_of(folder: Path) -> list[str]:
    """List the command lines of other processes that mention this folder."""
    others = (process for process in psutil.process_iter(["cmdline"]) if process.pid != os.getpid())
    return [line for other in others if str(folder) in (line := " ".join(other.info["cmdline"] or []))]


@pytest.mark.parametrize(
    ("ranks", "own"),
    [(None, ["None None None None None 1"]), (2, ["0 0 2 127.0.0.1 None 1", "1 1 2 127.0.0.1 None 1"])],
)
def test_a_process_is_no_rank_of_the_surrounding_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int | None, own: list[str]
) -> None:
    """The command may run in a shell of an allocation, or after a job script's `export WORLD_SIZE=8`."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID")
    for name in names:
        monkeypatch.setenv(name, "3")
    told = f"' '.join(os.environ.get(n, 'None') for n in {(*names, 'MINE')})"
    code = f"open(f'{{sys.argv[1]}}/seen{{os.getpid()}}', 'w').write({told})"
    with local.StopSignals() as stop:
        assert _run(code, ranks, tmp_path, stop) == 0
    assert sorted(path.read_text() for path in tmp_path.glob("seen*")) == own


def test_a_failed_rank_ends_the_others_and_shows_its_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "AFTER_ANOTHER_S", 0.1)
    code = "sys.exit('rank 1 says why') if os.environ['RANK'] == '1' else time.sleep(600)"
    with local.StopSignals() as stop:
        assert _run(code, 3, tmp_path, stop) == 1
    assert processes_of(tmp_path) == []
    assert capfd.readouterr().err.endswith("rank 1 says why\n")


def test_a_mistake_that_every_rank_finds_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with local.StopSignals() as stop:
        assert _run("sys.stderr.write('a mistake\\n'); sys.exit(2)", 2, tmp_path, stop) == 2
    assert capfd.readouterr().err == "a mistake\n"


@pytest.mark.slow
def test_a_signal_ends_ranks_and_children_that_ignore_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.5)
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]])\n"
        "open(sys.argv[1] + '/ready' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(600)"
    )

    def send() -> None:
        wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    with local.StopSignals() as stop:
        threading.Thread(target=send, daemon=True).start()
        _run(code, 2, tmp_path, stop)
        assert stop.signum == signal.SIGTERM
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_a_rank_does_not_outlive_a_launcher_that_was_killed(tmp_path: Path) -> None:
    local_alone = "import sys, time; from pathlib import Path; from nemo_upcycle.pipeline.executors import local\n"
    rank = f"{local_alone}local.end_with_launcher(); (Path(sys.argv[1]) / 'ready').touch(); time.sleep(600)"
    code = (
        f"{local_alone}command = [sys.executable, '-c', {rank!r}, sys.argv[1]]\n"
        "local.run_ranks(command, 1, {}, Path(sys.argv[1]) / 'l', local.StopSignals())"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    wait_until((tmp_path / "ready").is_file, launcher)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: processes_of(tmp_path) == [])


def test_a_stages_process_ends_with_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[bool] = []
    monkeypatch.setattr(local, "end_with_launcher", lambda: watched.append(True))
    monkeypatch.setattr("nemo_upcycle.pipeline.runner.is_verbose", lambda: True)
    monkeypatch.setattr(sys, "argv", ["pipeline", "import", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_module("nemo_upcycle.pipeline", run_name="__main__")
    assert watched


def test_held_port_serves_a_rank_and_nobody_else() -> None:
    """Another program once took the port before the rank's store opened it, and the whole run failed."""
    from torch.distributed import TCPStore

    with local.held_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, is_master=True)
        store.set("key", "value")
        assert TCPStore("127.0.0.1", port).get("key") == b"value"
