"""`nemo llm pretrain`, typed as a user types it, with the demo's recipe cut down by overrides."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.functional.tiny import BATCH, SEQUENCE, SIZES
from tests.waiting import HANG_S


NEMO = str(Path(sys.executable).with_name("nemo"))


def pretrain_command(parent: Path, data: Path, run_dir: Path, **overrides: Any) -> list[str]:
    """Return the command that upcycles and trains the tiny parent.

    Args:
        parent: the dense folder.
        data: a finished folder of `nemo-upcycle data`.
        run_dir: where the run's folder goes.
        overrides: of `trainer` and `log.ckpt`, among others, with `__` for the dot; they come last.
    """
    settings = {
        **{f"model.config.{name}": value for name, value in SIZES.items()},
        **{"data.folder": f"'{data}'", "data.seq_length": SEQUENCE, "data.global_batch_size": BATCH},
        **{"trainer.limit_val_batches": 0, "trainer.val_check_interval": 1},
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    factory = f"smollm2_135m_e8t2(dir='{run_dir}', dense='{parent}')"
    words = [f"{name}={value}" for name, value in settings.items()]
    return [NEMO, "llm", "pretrain", "--factory", factory, *words, "--yes"]


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, and return what it said."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=HANG_S)


def start(command: list[str], folder: Path, *, threads: int = 2) -> subprocess.Popen[str]:
    """Start a command in a session of its own, in `folder`; what it says goes to `folder/console.txt`."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE"))}
    with (folder / "console.txt").open("a") as console:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=variables | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
