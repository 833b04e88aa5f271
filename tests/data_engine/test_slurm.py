"""The tasks as jobs of a real Slurm, where there is one: `SLURM_PARTITION=debug make test-data`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest


pytest.importorskip("datatrove")

from tests.data_engine.blend import blend, command, same_as_here
from tests.waiting import HANG_S, wait_until


def _has_slurm() -> bool:
    return bool(shutil.which("sinfo")) and not subprocess.run(["sinfo"], capture_output=True, check=False).returncode


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not _has_slurm(), reason="no Slurm")]
PARTITION = os.environ.get("SLURM_PARTITION", "batch")


def test_same_bytes_as_on_one_machine(tmp_path: Path) -> None:
    same_as_here(tmp_path, "--slurm", PARTITION, "--workers", "2", "--time", "00:10:00")


def test_stopping_cancels_the_jobs(tmp_path: Path) -> None:
    plan = blend(tmp_path)
    process = subprocess.Popen(command(plan, "--slurm", PARTITION), stderr=subprocess.PIPE, text=True)
    jobs = plan.parent / "logs" / "slurm_jobs.json"
    wait_until(jobs.exists, process)
    numbers = json.loads(jobs.read_text(encoding="utf-8"))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=HANG_S)
    assert (process.returncode, said.strip()) == (128 + signal.SIGTERM, "stopped; what is finished is kept")
    assert numbers

    def none_is_queued() -> bool:
        queue = subprocess.run(["squeue", "--noheader", "-o", "%A"], capture_output=True, text=True, check=True).stdout
        return not set(numbers) & set(queue.split())

    wait_until(none_is_queued)
