"""A training stage in a process of its own, with whatever trains, to be sent signals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.waiting import wait_until


STAGE = (sys.executable, "-m", "nemo_upcycle.pipeline")


def environment() -> dict[str, str]:
    """Return the variables of a rank that no launcher starts, with a port that no other test has."""
    port = 20_000 + os.getpid() % 10_000
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "MASTER_PORT": str(port)}


def start_training(run_dir: Path, until_step: int) -> subprocess.Popen[str]:
    """Start the stage `pretrain` in a session of its own; return it after so many steps."""
    job = subprocess.Popen(
        [*STAGE, "pretrain", run_dir], stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    metrics = run_dir / "pretrain/metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= until_step, job)
    return job
