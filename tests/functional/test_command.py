"""The command that the package exists for, as typed, on threads: it saves, resumes, and stops when it is told to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from nemo_upcycle.sources.checkpoints import newest_checkpoint, step_of
from tests.functional.command import pretrain_command, start
from tests.functional.tiny import prepare
from tests.waiting import HANG_S, wait_until


pytestmark = [pytest.mark.slow, pytest.mark.full]
#: A matrix of 64 x 768 numbers; OpenMP shares out what has more than 32,768.
FFN = 768


class Job(NamedTuple):
    """A run of the command in a folder of its own."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def run_dir(self) -> Path:
        """Where NeMo puts the run."""
        return self.folder / "run" / "smollm2_135m_e8t2"

    def console(self) -> str:
        """Return what it said."""
        return (self.folder / "console.txt").read_text()

    def steps(self) -> list[int]:
        """Return the steps of its metrics."""
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def _group(leader: int) -> list[psutil.Process]:
    """Return the living processes of a group; killed ones that the system has still to reap do not count."""
    group = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                group.append(process)
    return group


@pytest.fixture(scope="module")
def start_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Start the command on one parent and one corpus; overrides as in `pretrain_command`."""
    parent, data = prepare(tmp_path_factory.mktemp("inputs"), intermediate_size=FFN)

    def start_in(folder: Path, **overrides: Any) -> Job:
        settings = {"model__config__ffn_hidden_size": FFN, "model__config__num_layers": 4} | overrides
        return Job(start(pretrain_command(parent, data, folder / "run", **settings), folder), folder)

    return start_in


def test_the_command_saves_on_two_threads_resumes_and_obeys_sigint(
    start_job: Callable[..., Job], tmp_path: Path
) -> None:
    """Two starts of the same command: saved at the end, then asynchronously, and stopped by Ctrl-C."""
    first = start_job(tmp_path, trainer__max_steps=2, log__ckpt__every_n_train_steps=2)
    assert first.process.wait(HANG_S) == 0, first.console()[-2000:]
    assert "TPU available" not in first.console()
    assert "Total params" not in first.console()  # Lightning's, of one rank
    kept = newest_checkpoint(first.run_dir / "checkpoints")
    assert kept is not None
    assert step_of(kept) == 1
    upcycled = (first.run_dir / "receipt.json").stat()

    again = start_job(
        tmp_path, trainer__max_steps=100_000, log__ckpt__every_n_train_steps=3, trainer__strategy__ckpt_async_save=True
    )
    wait_until(lambda: len(again.steps()) >= 12, again.process, lambda: again.console()[-2000:])
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(HANG_S) == -signal.SIGINT
    assert again.steps()[:12] == list(range(1, 13))
    kept = newest_checkpoint(first.run_dir / "checkpoints")
    assert kept is not None
    assert (step_of(kept) or 0) >= 2
    last_words = again.console().strip().splitlines()[-1]
    assert last_words.startswith("Stopped by SIGINT after step ")
    assert f"kept: {kept}. The same command goes on from there." in last_words
    wait_until(lambda: not _group(again.process.pid), said=lambda: "something that it started lives on")
    now = (first.run_dir / "receipt.json").stat()
    assert (now.st_mtime_ns, now.st_ino) == (upcycled.st_mtime_ns, upcycled.st_ino), "it was upcycled again"
