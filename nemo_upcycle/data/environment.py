"""Find and run the Python environment of the data engine, which cannot share NeMo's numpy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.package_info import __version__
from nemo_upcycle.utils.starting import away_from_here


VARIABLE = "NEMO_UPCYCLE_DATA_PYTHON"
_FIX = "run `nemo-upcycle doctor`: it prints the command that makes one"
ENGINE = "nemo_upcycle.data.engine"
_POLL_S = 0.1


def data_python() -> Path:
    """Return the Python of the data environment: `$NEMO_UPCYCLE_DATA_PYTHON`, or the Python of `.venv-data`.

    `.venv-data` lies beside this environment, or in the clone that the package is installed from.

    Raises:
        UpcycleError: there is no such Python.
    """
    named = os.environ.get(VARIABLE)
    folders = (Path(sys.prefix).parent, Path(__file__).parents[2])
    places = [Path(named).expanduser()] if named else [folder / ".venv-data/bin/python" for folder in folders]
    python = next((place for place in places if place.is_file()), None)
    if python is None:
        raise UpcycleError(
            f"${VARIABLE}" if named else "The environment of the data engine",
            kind="missing",
            got=f"is missing: {places[0]} does not exist",
            fix=f"{_FIX}, or set {VARIABLE} to its Python",
        )
    return python


def engine_version(python: Path) -> str:
    """Return the engine's versions, and check that the engine has this package's version of nemo-upcycle.

    Raises:
        UpcycleError: the engine does not start, or has another version.
    """
    try:
        command = away_from_here([str(python), "-m", ENGINE, "--version"])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UpcycleError(
            f"Data engine {python}", kind="state", got=f"cannot be started: {error.strerror}", fix=_FIX
        ) from None
    if done.returncode or f"nemo-upcycle {__version__}," not in done.stdout or "missing" in done.stdout:
        got = done.stdout.strip() or (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UpcycleError(
            f"Data engine {python}",
            kind="state",
            got=f"lacks nemo-upcycle {__version__} or datatrove ({got})",
            fix=_FIX,
        )
    return done.stdout.strip()


def run_engine(arguments: Sequence[str], check: Callable[[], None] = lambda: None) -> None:
    """Run the data engine to its end; the engine shows its own progress and errors.

    Args:
        arguments: arguments of the engine's command line.
        check: function called repeatedly while the engine runs, and once at its end; an exception from it ends the
            engine.

    Raises:
        StageError: the engine failed.
        KeyboardInterrupt: a signal stopped the engine.
    """
    command = away_from_here([str(data_python()), "-m", ENGINE, *arguments])
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())  # before the start: a signal may come early
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and not stop.wait(_POLL_S):
            check()
        if stop.is_set():
            process.terminate()
        status = process.wait()
    except BaseException:  # Ctrl-C reaches both processes; stop the engine, too
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status in (129, 130, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if status:
        raise StageError(
            "The data engine",
            kind="state",
            got=f"ended with status {status}",
            fix="read its message above, then run the command again, which resumes the build",
        )
    check()
