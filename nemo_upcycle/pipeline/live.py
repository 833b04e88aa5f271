"""Show a chain while it runs: rewrite its report regularly, and show one line per stage on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.reporting.live import EVERY_S
from nemo_upcycle.reporting.progress import training_line
from nemo_upcycle.utils.console import is_verbose
from nemo_upcycle.utils.progress import duration
from nemo_upcycle.utils.starting import away_from_here


#: Variable with the seconds between two reports of a running chain; 0: no report.
REPORT_EVERY = "NEMO_UPCYCLE_REPORT_EVERY_S"
#: Seconds that the last report may take.
_LAST_PAGE_S = 30.0
#: Seconds between two updates of the lines.
_REFRESH_S = 0.5


@contextmanager
def watched(run_dir: Path, price: float | None = None) -> Iterator[None]:
    """Let a separate process rewrite the report of a run regularly while the block runs.

    Args:
        run_dir: the run's folder.
        price: price of a GPU-hour; if None, the report names no cost.

    Raises:
        UpcycleError: `REPORT_EVERY` is not a number of seconds.
    """
    try:
        every_s = float(text := os.environ.get(REPORT_EVERY) or str(EVERY_S))
    except ValueError:
        fix = f"unset it for a page every {EVERY_S:g} s"
        raise UpcycleError(REPORT_EVERY, got=text, expected="a number of seconds, or 0 for no page", fix=fix) from None
    if every_s <= 0:
        yield
        return
    command = away_from_here([sys.executable, "-m", "nemo_upcycle.reporting.live", str(run_dir), str(every_s)])
    command += [] if price is None else [str(price)]
    log = run_dir / "logs" / "live_report.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as told:  # its own session, because Ctrl-C is for the launcher
        writer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True)
    sys.stderr.write(f"Live report: {run_dir / 'report.html'}\n")
    try:
        yield
    finally:
        writer.terminate()  # the process then writes how the run ended
        try:
            writer.wait(_LAST_PAGE_S)
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()


def has_live_lines() -> bool:
    """Return whether the console is a terminal, where each stage gets one line instead of its log."""
    return sys.stderr.isatty() and not is_verbose()


class LiveStages:
    """Shows one line per running stage on a terminal, and the stages' own messages above the lines.

    Args:
        run_dir: the run's folder.
        echoes: whether the messages are shown.
    """

    def __init__(self, run_dir: Path, *, echoes: bool) -> None:
        self._run_dir, self._echoes = run_dir, echoes
        self._running: dict[str, _Log] = {}
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> LiveStages:
        self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._live.stop()

    def began(self, name: str, log: Path) -> None:
        """Show a stage whose first rank will write to `log`."""
        log.unlink(missing_ok=True)  # left by an earlier start
        with self._lock:
            self._running[name] = _Log(name, log)

    def ended(self, name: str, *, is_done: bool) -> None:
        """Stop showing a stage.

        If the stage is not done, its last message is its error, which the caller shows.
        """
        with self._lock:
            log = self._running.pop(name)
            log.read()
            self._say([*log.said, log.held] if is_done and log.held else log.said)

    def _go_on(self) -> None:
        while not self._is_over.wait(_REFRESH_S):
            with self._lock:
                self._live.update(Text("\n".join(map(self._line, self._running.values()))), refresh=True)

    def _line(self, log: _Log) -> str:
        log.read()
        self._say(log.said)
        state = training_line(self._run_dir / log.name, log.began_s) or log.last.removeprefix(f"[{log.name}] ")
        line = f"{log.name}  {duration(time.time() - log.began_s)}  {state}"
        return line[: self._live.console.width - 1]

    def _say(self, lines: list[str]) -> None:
        if self._echoes:
            for line in lines:
                self._live.console.print(Text(line))
        lines.clear()


class _Log:
    """The log of a running stage. Each read continues where the last one stopped.

    Attributes:
        name: name of the stage.
        began_s: start time of the stage.
        last: last line of the log.
        said: lines that start with the stage's name and have not been shown, except the last such line.
        held: last line that starts with the stage's name; it may be the stage's error.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path, self._offset = name, path, 0
        self.began_s, self.last, self.held = time.time(), "", ""
        self.said: list[str] = []

    def read(self) -> None:
        """Read the new lines."""
        try:
            with self._path.open("rb") as handle:
                handle.seek(self._offset)
                new = handle.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            self.last = line.strip() or self.last
            if line.startswith(f"[{self.name}] "):
                self.said += [self.held] if self.held else []
                self.held = line
