"""Run stages of any trainer, each in its own process, to the end or until a kill in the middle."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from nemo_upcycle.utils.files import MARKER
from tests.distributed.ranks import run_ranks
from tests.functional.kills import Strike, arm


STAGES = ("import", "data", "upcycle", "pretrain", "dense_ct", "export", "evaluate", "report")
TRAININGS = ("pretrain", "dense_ct")


class Answer(NamedTuple):
    """Exit status and console output of a stage's process."""

    status: int
    text: str


def kill_when(path: Path, lines: int = 0) -> None:
    """Kill this process as `kill -9` does, as soon as `path` exists and has at least `lines` lines."""
    while True:
        with contextlib.suppress(OSError):
            if path.exists() and (not lines or path.read_text().count("\n") >= lines):
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)


def _stage(name: str, run_dir: str, kill_at: tuple[str, int] | Strike | None) -> Answer:
    sys.stderr = io.StringIO()  # receives messages and progress
    from nemo_upcycle.pipeline.runner import run_stage

    if isinstance(kill_at, Strike):
        arm(kill_at)
    elif kill_at:
        threading.Thread(target=kill_when, args=(Path(run_dir) / kill_at[0], kill_at[1]), daemon=True).start()
    status = 0
    try:
        run_stage(name, run_dir)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    return Answer(status, sys.stderr.getvalue())


def run_in_own_process(
    name: str, run_dir: Path, ranks: int = 1, kill_at: tuple[str, int] | Strike | None = None
) -> Answer:
    """Run a stage as NeMo-Run's task does, kill it if asked, and return the first rank's answer."""
    return run_ranks(_stage, ranks, name, str(run_dir), kill_at, process_group=False)[0]


def run_stages(
    run_dir: Path,
    names: Iterable[str] = STAGES,
    ranks: int = 1,
    killed: Mapping[str, tuple[str, int]] | None = None,
) -> None:
    """Run stages, all of which must succeed.

    Args:
        run_dir: folder of a chain with a written plan.
        names: stages, in order.
        ranks: number of ranks of a training.
        killed: stage -> path and lines. The stage is killed when the file has that many lines, and then run again.
    """
    for name in names:
        count = ranks if name in TRAININGS else 1
        if kill_at := (killed or {}).get(name):
            with pytest.raises(RuntimeError, match="died"):
                run_in_own_process(name, run_dir, count, kill_at)
            assert not (run_dir / name / MARKER).exists()
        answer = run_in_own_process(name, run_dir, count)
        assert answer.status == 0, answer.text
        assert f"[{name}] done in" in answer.text
