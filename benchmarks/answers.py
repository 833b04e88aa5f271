"""Measure how long commands take until they answer: what they import, and what they look at before anything starts.

    python -m benchmarks.answers

Processor seconds do not depend on what else a machine does, but on the machine: compare them with those of one that
you know, before and after a change. NeMo's commands import NeMo before they read what was typed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


CHAIN = ("nemo", "upcycle", "pipeline", "--factory")
SLURM = ("run.executor=slurm", "run.executor.account=me", "run.executor.partition=a")
#: What it is -> what is typed.
COMMANDS = {
    "help": ("nemo-upcycle", "--help"),
    "plan": ("nemo-upcycle", "plan", "--recipe", "llama3_8b_e8t2", "--gpus", "64"),
    "convert, refused": ("nemo-upcycle", "convert", ".", "moe", "--experts", "1000000000"),
    "chain, refused": (*CHAIN, "smollm2_135m_e8t2", "dense=/nope", "--yes"),
    "chain, dry run": (*CHAIN, "llama3_8b_e8t2", "dir=run", *SLURM, "--dryrun"),
}


def measure(command: tuple[str, ...], folder: str) -> tuple[int, float, float]:
    """Return a command's status, and its seconds: those of its processors, and those that a user waits."""
    program = Path(sys.executable).with_name(command[0])
    cpu_s, start_s = sum(os.times()[2:4]), time.monotonic()
    done = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, check=False)
    return done.returncode, sum(os.times()[2:4]) - cpu_s, time.monotonic() - start_s


def main() -> None:
    """Print the table."""
    print("| command | status | processor s | s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, command in COMMANDS.items():
            measure(command, folder)  # files that are not in the page cache yet
            status, cpu_s, wall_s = measure(command, folder)
            print(f"| {name} | {status} | {cpu_s:.1f} | {wall_s:.1f} |", flush=True)


if __name__ == "__main__":
    main()
