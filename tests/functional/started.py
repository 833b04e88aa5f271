"""Commands in their own processes, for tests that wait for them and send them signals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_upcycle.pipeline.executors.ft import ft_command
from tests.waiting import HANG_S, wait_until


ROOT = Path(__file__).parents[2]
STAGE = (sys.executable, "-m", "nemo_upcycle.pipeline")
NEMO = str(Path(sys.executable).with_name("nemo"))
#: A user's own script that does the same as `nemo upcycle pipeline`.
CHAIN = ROOT / "tests/functional/tiny_pipeline.py"


class Command:
    """A process of a Python script with its own session. Its working folder is the folder of its log.

    Args:
        log: file for the output; another start appends to the file.
        words: the script and its arguments.
        variables: additional environment variables. The variables of a rank are removed.
    """

    def __init__(self, log: Path, *words: object, **variables: str) -> None:
        self._start(log, [sys.executable, *map(str, words)], _plain() | variables)

    @classmethod
    def pasted(cls, log: Path, line: str, **variables: str) -> Command:
        """Run a line that the product printed, in a shell without PYTHONPATH."""
        command = cls.__new__(cls)
        plain = {name: value for name, value in _plain().items() if name != "PYTHONPATH"}
        command._start(log, ["bash", "-c", line], plain | variables)
        return command

    def _start(self, log: Path, words: list[str], variables: Mapping[str, str]) -> None:
        self.log, self.words = log, words
        with log.open("ab") as said:
            self.process = subprocess.Popen(
                words,
                cwd=log.parent,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def text(self) -> str:
        """Read the log."""
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Wait for the end, and return the exit status."""
        return self.process.wait(timeout=2 * HANG_S)

    def wait_for(self, found: Callable[[], object]) -> None:
        """Wait until a condition holds while the command runs."""
        wait_until(found, self.process, self.text)

    def wait_for_lines(self, path: Path, lines: int) -> None:
        """Wait until the command has written a file with `lines` lines."""
        self.wait_for(lambda: path.is_file() and path.read_text().count("\n") >= lines)


def under_ft_launcher(module: str, *words: object) -> subprocess.Popen[str]:
    """Start a module on two ranks under ft_launcher, as on a node outside Slurm."""
    rank = (sys.executable, "-m", module, *map(str, words))
    command = ft_command(rank, 1, 2, silence_s=20.0, save_s=60.0, restarts=2)
    variables = _plain() | {"GROUP_RANK": "0"}
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _plain() -> dict[str, str]:
    """Return this process's variables without a launcher's variables, and with the repository in PYTHONPATH."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE"))}
    return plain | {"PYTHONPATH": str(ROOT)}


def environment() -> dict[str, str]:
    """Return the variables of a rank that no launcher starts, with a port that no other test uses."""
    port = 20_000 + os.getpid() % 10_000
    return os.environ | {"PYTHONPATH": str(ROOT), "MASTER_PORT": str(port)}


def start_training(run_dir: Path, until_step: int) -> subprocess.Popen[str]:
    """Start the stage `pretrain` in its own session, and return its process after `until_step` steps."""
    job = subprocess.Popen(
        [*STAGE, "pretrain", run_dir], stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    metrics = run_dir / "pretrain/metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= until_step, job)
    return job
