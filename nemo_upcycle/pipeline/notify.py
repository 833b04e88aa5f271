"""Run the user's own command when a run stops, fails or ends.

The stage itself runs the command. If the stage was killed, the launcher runs the command, provided that the launcher
still waits for the stage. A file in the stage's folder ensures that the command runs once for each stop.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nemo_upcycle.errors import UnfinishedError, UpcycleError
from nemo_upcycle.pipeline.markers import FAILED
from nemo_upcycle.pipeline.order import unfinished
from nemo_upcycle.pipeline.plan import Stage, WorkPlan
from nemo_upcycle.utils.masking import without_secrets


#: Event of a run whose last stage is done; the other events are the words in the file `ENDED` of a stage.
DONE = "done"
#: File in a stage's folder, written when the command runs for a stop, and deleted when the stage starts.
NOTIFIED = "_NOTIFIED"
#: Largest time that the command may take (s).
LIMIT_S = 20
#: Smallest exit status of a launcher that a signal ended, such as Ctrl-C.
_BY_SIGNAL = 128


def checked_command(command: str | None, *, is_here: bool) -> str:
    """Return the user's command with an absolute path of its program; empty if there is no command.

    Args:
        command: program and its arguments, as in a shell, but without a shell's operators.
        is_here: whether the stages run on this machine, so that the program must exist here.

    Raises:
        UpcycleError: the command cannot be split, contains a secret, or its program does not exist.
    """
    try:
        words = shlex.split(command or "")
    except ValueError:
        words = []
    if command and not words:
        fix = "close each quote"
        raise UpcycleError("notify", got=f"'{command}'", expected="a program and its arguments", fix=fix)
    if words and without_secrets(command) != command:
        fix = "write the command into a script that only you can read, and name the script"
        raise UpcycleError("notify", kind="refused", got="contains a secret, which the run's plan would show", fix=fix)
    if not words:
        return ""
    if "/" in words[0]:
        words[0] = str(Path(words[0]).expanduser().absolute())
    if is_here and not shutil.which(words[0]):
        is_file = Path(words[0]).is_file()
        fix = f"make it executable: `chmod +x {words[0]}`" if is_file else "check its name, or give its path"
        got = "is not an executable file" if is_file else "does not exist"
        raise UpcycleError(f"The program {words[0]} of notify", kind="state", got=got, fix=fix)
    return shlex.join(words)


def notify(command: str, event: str, stage: Path, text: str) -> None:
    """Run the user's command for an event, with a message on its standard input. A failure only gives a warning.

    Args:
        command: result of `checked_command`; if empty, nothing happens.
        event: `stopped`, `failed` or `done`.
        stage: folder of the stage.
        text: message for people.
    """
    if not command:
        return
    about = {"EVENT": event, "STAGE": stage.name, "DIR": str(stage.parent)}
    variables = {f"NEMO_UPCYCLE_{name}": value for name, value in about.items()}
    message = f"{stage.parent}: {stage.name} {event}\n{text.strip()}\n"
    try:
        ended = subprocess.run(
            shlex.split(command),
            input=message,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        why = f"took longer than {LIMIT_S} s"
    except OSError as error:
        why = f"did not start: {error.strerror}"
    else:
        sys.stderr.write(ended.stdout)
        why = f"ended with status {ended.returncode}" if ended.returncode else ""
    if why:
        sys.stderr.write(f"Warning: the command of notify {why}: {command}\n")


def notify_of_end(command: str, event: str, stage: Path, text: str) -> None:
    """Run the user's command for a stage that ended without a result, unless it ran since the stage's last start.

    Args:
        command: result of `checked_command`; if empty, nothing happens.
        event: `stopped` or `failed`.
        stage: folder of the stage.
        text: message for people.
    """
    if not command:
        return
    try:
        (stage / NOTIFIED).touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError:  # the disk may be full, which may be the reason of the stop
        pass
    notify(command, event, stage, text)


@contextmanager
def notifying(plan: WorkPlan, stages: Sequence[Stage], run_dir: Path) -> Iterator[None]:
    """Run the user's command if a stage that the block waits for was killed, and so could not run the command itself.

    Args:
        plan: plan of the run, with its command.
        stages: stages that the block waits for, in order.
        run_dir: the run's folder.
    """
    for stage in stages:
        with suppress(OSError):
            (run_dir / stage.name / NOTIFIED).unlink(missing_ok=True)
    try:
        yield
    except (UnfinishedError, SystemExit) as error:
        is_detached = isinstance(error, SystemExit) and int(error.code or 0) >= _BY_SIGNAL
        if not is_detached and (name := unfinished(stages, run_dir, plan)):
            text = str(error) if isinstance(error, UnfinishedError) else "The stage ended without a message."
            notify_of_end(plan.notify, FAILED, run_dir / name, text)
        raise
