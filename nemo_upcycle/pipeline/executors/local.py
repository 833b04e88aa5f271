"""Run a stage on this machine with one process per rank. No rank outlives the launcher.

NeMo-Run's local executor is not enough. NeMo-Run's executor starts the next stage even if a stage has failed, ends
torchrun but not torchrun's workers, and obeys only the second Ctrl-C. Also, torchrun prints its own traceback below
the stage's message.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from nemo_upcycle.errors import StageStopped


#: Exit status of a stage that found a user's mistake.
USERS_MISTAKE = 2
#: Time limits (seconds) for ranks to end by themselves after SIGTERM, and after another rank failed.
GRACE_S, AFTER_ANOTHER_S = 5.0, 2.0
_POLL_S = 0.1
#: Number of lines from the end of the log that are shown if a stage failed without an explanation.
_TAIL = 40
_LAUNCHER = "NEMO_UPCYCLE_LAUNCHER"
#: Variables that tell a process which rank of which job it is. A shell in a Slurm allocation, or a job script, may
#: have set these variables, but a process that is started here is not a rank of that job.
_OF_A_RANK = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS"),
)


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end this process in the block, because OmegaConf can turn KeyboardInterrupt into another error."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class StopSignals:
    """Records the first SIGINT or SIGTERM that arrives while the block runs. A waiting loop polls `signum`."""

    signum: int | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum


def run_ranks(
    command: Sequence[str],
    ranks: int | None,
    environment: Mapping[str, str],
    logs: Path,
    stop: StopSignals,
    *,
    is_quiet: bool = False,
) -> int:
    """Run a command once per rank. Return its exit status, or minus the number of the signal that ended it.

    The first rank writes to the console, and the others into `logs`. If a rank fails, the last lines of its
    log are shown, and the other ranks are ended. If `stop` has a signal, all ranks are ended.

    Args:
        command: program and its arguments.
        ranks: number of processes, which get torchrun's variables; if None, one plain process without these variables.
        environment: variables in addition to this process's own variables.
        logs: prefix of the log files of all ranks except the first.
        stop: the launcher's signals.
        is_quiet: whether the first rank also writes into `logs`.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with held_port() as port:
        try:
            for variables in [{}] if ranks is None else _rank_variables(ranks, port):
                rank = len(processes)
                log = log_of(logs, rank) if rank or is_quiet else None
                processes.append(_start(command, {**environment, **variables}, log))
            failed = _wait(processes, stop)
        finally:
            _end(processes)
    if failed is None:
        return 0
    speaker = 0 if processes[0].returncode == USERS_MISTAKE else failed
    if (speaker or is_quiet) and not stop.signum:
        sys.stderr.write(_last_words(log_of(logs, speaker), f"[{logs.name}] ", processes[speaker].returncode))
    return processes[failed].returncode


def _start(command: Sequence[str], environment: Mapping[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    own = {"PYTHONUNBUFFERED": "1", _LAUNCHER: str(os.getpid())}
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") if log else contextlib.nullcontext() as output:
        # Each rank gets its own session, so that Ctrl-C reaches only the launcher, and a signal to the group reaches
        # all processes of the rank.
        return subprocess.Popen(
            list(command),
            env={**inherited, **own, **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def log_of(logs: Path, rank: int) -> Path:
    """Return the log file of a rank, from the prefix of its stage's log files."""
    return logs.with_name(f"{logs.name}-rank{rank}.log")


def _last_words(log: Path, name: str, status: int) -> str:
    """Return a stage's own last message if it explained its end, else the last lines of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    own = [number for number, line in enumerate(lines) if line.startswith(name)]
    says_why = own and status in (USERS_MISTAKE, StageStopped.exit_status)
    return "\n".join(lines[own[-1] :] if says_why else [f"--- {log}", *lines[-_TAIL:]]) + "\n"


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Reserve a port of this machine while the block runs, so that only a rank's store can listen on the port.

    Ranks import for seconds before the first rank listens. Without a reservation, another process may take the port
    meanwhile. This function binds a socket to the port and does not listen. Then the kernel gives the port to no
    process that asks for any free port, and to no outgoing connection. A listener with SO_REUSEADDR, such as torch's
    store, can still use the port.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _rank_variables(ranks: int, port: int) -> list[dict[str, str]]:
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"nemo-upcycle-{os.getpid()}",  # tells Lightning that the ranks exist already
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(processes: list[subprocess.Popen[bytes]], stop: StopSignals) -> int | None:
    """Return the index of the first process that failed, 0 after a stop signal, or None if all processes finished."""
    while not stop.signum:
        statuses = [process.poll() for process in processes]
        if bad := [rank for rank, status in enumerate(statuses) if status]:
            deadline_s = time.monotonic() + AFTER_ANOTHER_S  # let each rank report a mistake that all have
            while time.monotonic() < deadline_s and any(process.poll() is None for process in processes):
                time.sleep(_POLL_S)
            return bad[0]
        if None not in statuses:
            return None
        time.sleep(_POLL_S)
    return 0


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the remaining processes of the groups with SIGTERM, or with SIGKILL if they do not obey."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        deadline_s = time.monotonic() + GRACE_S
        for process in processes:
            _signal_group(process, signum)
        while any(_signal_group(process, 0) for process in processes) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> bool:
    """Send a signal to a rank and all processes that it started. Return whether any of them still exists."""
    process.poll()  # otherwise the group's leader would still count after it has ended
    try:
        os.killpg(process.pid, signum)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end_with_launcher() -> None:
    """End this rank and its processes if the launcher disappears (`kill -9`)."""
    launcher = int(os.environ.get(_LAUNCHER) or 0)
    if launcher:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
