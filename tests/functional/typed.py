"""Types command lines of `nemo` and of scripts in one process that has already imported NeMo."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Answer(NamedTuple):
    """Exit status, output and written files of a command."""

    status: int
    text: str
    written: list[str]


def type_commands(commands: list[list[str]], folder: str, watched: str) -> list[Answer]:
    """Run commands one after the other in this process.

    If a command's first word is a script, run the script. Otherwise run `nemo`. Python finds modules in `watched`,
    for example a user's recipes.
    """
    from nemo_run.cli.api import create_cli

    os.chdir(folder)
    sys.path.insert(0, watched)
    os.environ["COLUMNS"] = "200"
    answers = []
    for words in commands:
        is_script = words[0].endswith(".py")
        sys.argv = words if is_script else ["nemo", *words]
        before = {*Path(folder).rglob("*"), *Path(watched).rglob("*")}
        status = 0
        with tempfile.TemporaryFile() as console:
            for descriptor in (1, 2):  # also for the processes of stages
                os.dup2(console.fileno(), descriptor)
            try:
                runpy.run_path(words[0], run_name="__main__") if is_script else create_cli()()
            except SystemExit as exit_:
                status = int(exit_.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
            console.seek(0)
            text = console.read().decode()
        written = {*Path(folder).rglob("*"), *Path(watched).rglob("*")} - before
        answers.append(Answer(status, text, sorted(str(path) for path in written if "__pycache__" not in path.parts)))
    return answers
