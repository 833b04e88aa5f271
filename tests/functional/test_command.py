"""The main command, typed as by a user, with two threads: training saves in the background and stops on a signal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from nemo_upcycle.sources.checkpoints import newest_checkpoint, step_of
from tests.functional.started import NEMO, Command
from tests.functional.tiny import BATCH, SEQUENCE, SIZES, prepare
from tests.waiting import wait_until


pytestmark = [pytest.mark.slow, pytest.mark.full]
#: FFN size. A matrix then has 64 x 768 numbers. OpenMP uses both threads only for more than 32,768 numbers.
FFN = 768


def _group(leader: int) -> list[psutil.Process]:
    """Return the living processes of a group, without killed processes that the system has yet to reap."""
    group = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                group.append(process)
    return group


def test_the_command_saves_asynchronously_on_two_threads_and_obeys_sigint(tmp_path: Path) -> None:
    dense, data = prepare(tmp_path / "inputs", intermediate_size=FFN)
    settings = {f"model.config.{name}": value for name, value in (SIZES | {"ffn_hidden_size": FFN}).items()}
    settings |= {"data.folder": f"'{data}'", "data.seq_length": SEQUENCE, "data.global_batch_size": BATCH}
    settings |= {"trainer.limit_val_batches": 0, "trainer.val_check_interval": 1, "trainer.max_steps": 100_000}
    settings |= {"log.ckpt.every_n_train_steps": 3, "trainer.strategy.ckpt_async_save": True}
    factory = f"smollm2_135m_e8t2(dir='{tmp_path / 'run'}', dense='{dense}')"
    words = [f"{name}={value}" for name, value in settings.items()]
    typed = [NEMO, "llm", "pretrain", "--factory", factory, *words, "--yes"]
    command = Command(tmp_path / "console.txt", *typed, OMP_NUM_THREADS="2")
    run_dir = tmp_path / "run/smollm2_135m_e8t2"
    metrics = run_dir / "metrics.jsonl"
    command.wait_for_lines(metrics, 12)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == -signal.SIGINT
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][:12] == list(range(1, 13))
    kept = newest_checkpoint(run_dir / "checkpoints")
    assert kept is not None
    assert (step_of(kept) or 0) >= 2
    said = command.text()
    assert "TPU available" not in said
    assert "Total params" not in said  # Lightning would print the total of one rank
    last_words = said.strip().splitlines()[-1]
    assert last_words.startswith("Stopped by SIGINT after step ")
    assert f"kept: {kept}. The same command resumes from there." in last_words
    wait_until(lambda: not _group(command.process.pid), said=lambda: "something that it started lives on")
