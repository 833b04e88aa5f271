"""Kills and signals: the engine stops with its workers and jobs, and says so in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nemo_upcycle.data.environment import VARIABLE
from tests.data_engine.blend import blend
from tests.data_engine.runs import Slurm, command, run, stats
from tests.waiting import HANG_S, wait_until


def _processes() -> dict[int, tuple[str, int]]:
    """Return the state and parent of every process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = entry.read_text().rpartition(")")[2].split()
            found[int(entry.parent.name)] = state, int(parent)
    return found


def _descendants(pid: int) -> set[int]:
    processes = _processes()
    found: set[int] = set()
    while new := {child for child, (_, parent) in processes.items() if parent in found | {pid}} - found:
        found |= new
    return found


def _alive(pids: set[int]) -> set[int]:
    return {pid for pid, (state, _) in _processes().items() if pid in pids and state != "Z"}


def _start(plan: Path, after_s: float) -> tuple[subprocess.Popen[str], set[int]]:
    """Start the command. Return the command and its processes `after_s` seconds after its first task began."""
    process = subprocess.Popen(command(plan, "--workers", "2"), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: _begun(plan), process, poll_s=0.01)
    time.sleep(after_s)
    return process, _descendants(process.pid)


def _begun(plan: Path) -> list[Path]:
    """Return the logs of the tasks that have begun."""
    return list(plan.parent.glob("logs/*/logs/*.log"))


#: Starts the engine as `nemo-upcycle data` does.
STARTER = "import sys; from nemo_upcycle.data.environment import run_engine; run_engine(sys.argv[1:])"


def test_killed_starter_takes_engine_and_jobs_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Slurm(tmp_path / "bin", monkeypatch)
    for name, line in {"sbatch": "echo Submitted batch job 17", "squeue": "echo 17_0", "scancel": ""}.items():
        slurm.says(name, line)
    plan = blend(tmp_path)
    words = [sys.executable, "-c", STARTER, str(plan), "--slurm", "any"]
    process = subprocess.Popen(words, env={**os.environ, VARIABLE: sys.executable}, stderr=subprocess.DEVNULL)
    wait_until((plan.parent / "logs/slurm_jobs.json").is_file, process)
    family = _descendants(process.pid)
    assert len(family) >= 2  # the engine and its child
    process.kill()
    process.wait()
    wait_until(lambda: not _alive(family))
    assert slurm.calls("scancel") == ["17"]


def test_the_engine_outlives_its_shell_under_nohup(tmp_path: Path) -> None:
    plan = blend(tmp_path, documents=2000, words=60)
    words = ["bash", "-c", 'nohup "$@" & wait', "bash", *command(plan, "--workers", "2")]
    shell = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: _begun(plan), shell)
    (engine,) = {pid for pid in _descendants(shell.pid) if str(plan) in Path(f"/proc/{pid}/cmdline").read_text()} - {
        pid for child in _descendants(shell.pid) for pid in _descendants(child)
    }
    shell.kill()
    shell.wait()
    os.kill(engine, signal.SIGHUP)
    wait_until(lambda: not _alive({engine}))
    assert stats(plan.parent, 5)["steps"]["read"]["in"] == 2002


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stops_at_once_with_one_line(tmp_path: Path, number: signal.Signals) -> None:
    plan = blend(tmp_path, documents=20_000, words=60)
    process, family = _start(plan, 0.3)
    assert process.poll() is None
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + number
    assert said.strip() == "stopped; what is finished is kept"
    assert not _alive(family)


def test_second_engine_is_refused(tmp_path: Path) -> None:
    plan = blend(tmp_path, documents=2000, words=60)
    process, _ = _start(plan, 0)
    process.send_signal(signal.SIGSTOP)  # a stopped engine keeps the folder locked until it is killed
    try:
        assert process.poll() is None
        refused = run(plan)
        assert refused.returncode == 2
        assert f"{plan.parent} is in use by another data engine" in refused.stderr
    finally:
        process.kill()
        process.communicate()


def test_killed_worker_is_an_error(tmp_path: Path) -> None:
    plan = blend(tmp_path, documents=20_000, words=60)
    process, family = _start(plan, 0.3)
    parents = {pid: _descendants(pid) for pid in family}
    worker = max(pid for pid in family if not parents[pid])
    os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=HANG_S)
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith("error: A worker was killed")
    assert not _alive(family)
