"""The command that the package exists for, as typed, on threads: it saves as it goes, and stops when it is told to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from nemo_upcycle.sources.checkpoints import newest_checkpoint, step_of
from tests.functional.command import pretrain_command, start
from tests.functional.tiny import prepare
from tests.waiting import HANG_S, wait_until


pytestmark = [pytest.mark.slow, pytest.mark.full]
#: A matrix of 64 x 768 numbers; OpenMP shares out what has more than 32,768.
FFN = 768


def _group(leader: int) -> list[psutil.Process]:
    """Return the living processes of a group; killed ones that the system has still to reap do not count."""
    group = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                group.append(process)
    return group


def test_the_command_saves_asynchronously_on_two_threads_and_obeys_sigint(tmp_path: Path) -> None:
    inputs = prepare(tmp_path / "inputs", intermediate_size=FFN)
    settings = {"model__config__ffn_hidden_size": FFN, "model__config__num_layers": 4, "trainer__max_steps": 100_000}
    settings |= {"log__ckpt__every_n_train_steps": 3, "trainer__strategy__ckpt_async_save": True}
    process = start(pretrain_command(*inputs, tmp_path / "run", **settings), tmp_path)
    run_dir, console = tmp_path / "run/smollm2_135m_e8t2", tmp_path / "console.txt"
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 12, process, console.read_text)
    process.send_signal(signal.SIGINT)
    assert process.wait(HANG_S) == -signal.SIGINT
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][:12] == list(range(1, 13))
    kept = newest_checkpoint(run_dir / "checkpoints")
    assert kept is not None
    assert (step_of(kept) or 0) >= 2
    said = console.read_text()
    assert "TPU available" not in said
    assert "Total params" not in said  # Lightning's, of one rank
    last_words = said.strip().splitlines()[-1]
    assert last_words.startswith("Stopped by SIGINT after step ")
    assert f"kept: {kept}. The same command goes on from there." in last_words
    wait_until(lambda: not _group(process.pid), said=lambda: "something that it started lives on")
