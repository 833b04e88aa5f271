"""`nemo` with a list of command lines, in one process that has imported NeMo before."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Answer(NamedTuple):
    """How the command ended, what it said, and what it wrote."""

    status: int
    text: str
    written: list[str]


def type_commands(commands: list[list[str]], folder: str, watched: str, programs: str = "") -> list[Answer]:
    """Run `nemo` with these words, one command after the other, in this process, which has imported NeMo before."""
    from nemo_run.cli.api import create_cli

    os.chdir(folder)
    os.environ["COLUMNS"] = "200"
    if programs:
        os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    answers = []
    for words in commands:
        sys.argv = ["nemo", *words]
        before = {*Path(folder).rglob("*"), *Path(watched).rglob("*")}
        status = 0
        with tempfile.TemporaryFile() as console:
            for descriptor in (1, 2):  # of the stages' processes, too
                os.dup2(console.fileno(), descriptor)
            try:
                create_cli()()
            except SystemExit as exit_:
                status = int(exit_.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
            console.seek(0)
            text = console.read().decode()
        written = {*Path(folder).rglob("*"), *Path(watched).rglob("*")} - before
        answers.append(Answer(status, text, sorted(map(str, written))))
    return answers
