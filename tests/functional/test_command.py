"""The command that the package exists for, as typed, on threads: it saves, resumes, and stops when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nemo_upcycle.checkpoints import newest_checkpoint, step_of
from tests.functional.command import pretrain_command, start
from tests.functional.tiny import prepare


pytestmark = pytest.mark.slow
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

    def metrics(self) -> list[dict[str, Any]]:
        """Return its lines of metrics."""
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, timeout_s: float) -> int:
        """Return its exit status; kill it, and fail, when it takes longer."""
        try:
            return self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"still running after {timeout_s} s:\n{self.console()[-2000:]}")


class Jobs:
    """Starts the command on one parent and one corpus."""

    def __init__(self, folder: Path) -> None:
        self.parent, self.data = prepare(folder, intermediate_size=FFN)

    def start(self, folder: Path, **overrides: Any) -> Job:
        """Start the command; overrides as in `pretrain_command`."""
        settings = {"model__config__ffn_hidden_size": FFN, "model__config__num_layers": 4} | overrides
        return Job(start(pretrain_command(self.parent, self.data, folder / "run", **settings), folder), folder)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("inputs"))


def test_saving_on_two_threads_ends_and_the_same_command_resumes(jobs: Jobs, tmp_path: Path) -> None:
    first = jobs.start(tmp_path, trainer__max_steps=2)
    assert first.wait(120) == 0, first.console()[-2000:]
    kept = newest_checkpoint(first.run_dir / "checkpoints")
    assert kept is not None
    assert step_of(kept) == 1
    before = (first.run_dir / "receipt.json").stat()
    again = jobs.start(tmp_path, trainer__max_steps=3)
    assert again.wait(120) == 0, again.console()[-2000:]
    assert [line["step"] for line in again.metrics()] == [1, 2, 3]
    kept = newest_checkpoint(first.run_dir / "checkpoints")
    assert kept is not None
    assert step_of(kept) == 2
    after = (first.run_dir / "receipt.json").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino), "it was upcycled again"


def test_an_asynchronous_save_on_two_threads_ends(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.start(
        tmp_path, trainer__max_steps=4, log__ckpt__every_n_train_steps=2, trainer__strategy__ckpt_async_save=True
    )
    assert job.wait(120) == 0, job.console()[-2000:]
    kept = newest_checkpoint(job.run_dir / "checkpoints")
    assert kept is not None
    assert step_of(kept) == 3
    assert not list((job.run_dir / "checkpoints").glob("*-unfinished"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_ends_the_job_at_once_and_says_what_is_kept(
    jobs: Jobs, tmp_path: Path, signum: signal.Signals
) -> None:
    job = jobs.start(tmp_path, trainer__max_steps=100_000, log__ckpt__every_n_train_steps=5)
    deadline_s = time.monotonic() + 120
    while len(job.metrics()) < 8:
        assert job.process.poll() is None, job.console()[-2000:]
        assert time.monotonic() < deadline_s, job.console()[-2000:]
        time.sleep(0.1)
    job.process.send_signal(signum)
    assert job.wait(5) == -signum
    last_words = job.console().strip().splitlines()[-1]
    assert last_words.startswith(f"Stopped by {signum.name} after step ")
    assert str(newest_checkpoint(job.run_dir / "checkpoints")) in last_words
    assert "The same command goes on from there." in last_words
    with pytest.raises(ProcessLookupError):  # nothing that it started lives on
        os.killpg(job.process.pid, 0)
