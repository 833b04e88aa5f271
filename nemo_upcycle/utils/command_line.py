"""The typed command as a line that can be pasted into a shell, with changed settings if needed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_upcycle.utils.masking import masked_text, without_secrets


#: The file in a run's folder that holds the typed command.
COMMAND = "command.txt"
#: Options that select a part of the chain, show it, rewind it or confirm its start -> whether a value follows.
_OF_A_PART = {
    **dict.fromkeys(("--from", "--until", "--only", "--render", "--rewind", "--skip-steps"), True),
    **dict.fromkeys(("from_stage", "until_stage", "only_stage", "render", "rewind", "skip_steps"), True),
    **dict.fromkeys(("--dryrun", "-d", "--yes", "-y"), False),
}


@dataclass(frozen=True)
class CommandLine:
    """A command with everything needed to type it again.

    Attributes:
        words: the program and its arguments.
        python_path: value of PYTHONPATH; "" if the command does not need it.
        folder: folder in which the command is typed; "" for the current folder.

    Example:
        >>> line = CommandLine(("nemo", "upcycle", "pipeline", "dir=runs/a", "--until", "data"), "my recipes")
        >>> print(line.changed({"dir": "runs/b"}))
        PYTHONPATH='my recipes' nemo upcycle pipeline dir=runs/b --yes
    """

    words: tuple[str, ...]
    python_path: str = ""
    folder: str = ""

    def __str__(self) -> str:
        start = f"cd {shlex.quote(self.folder)} && " if self.folder else ""
        path = f"PYTHONPATH={shlex.quote(self.python_path)} " if self.python_path else ""
        return f"{start}{path}{shlex.join(self.words)}"

    @classmethod
    def typed(cls) -> CommandLine:
        """Return the command of this process, with secrets masked."""
        program, *words = sys.argv
        words = [masked_text(word) if re.search(r"\benv_vars\b", word) else without_secrets(word) for word in words]
        path = os.environ.get("PYTHONPATH", "")
        main = getattr(sys.modules.get("__main__"), "__spec__", None)
        if main and main.origin == program:
            start = [_python(), "-m", main.name.removesuffix(".__main__")]
        elif not Path(program).is_file() or Path(program).absolute() == own_program(Path(program).name):
            start = [shown_program(Path(program).name)]
            path = path if _finds_module(path, words) else ""  # kept for a script, whose imports are unknown
        else:
            start = [_python(), program]
        return cls((*start, *words), path)

    @classmethod
    def read(cls, text: str) -> CommandLine | None:
        """Read a line that `str` wrote; return None for any other text."""
        try:
            words = shlex.split(text)
        except ValueError:
            return None
        folder = path = ""
        if words[:1] == ["cd"] and words[2:3] == ["&&"]:
            folder, words = words[1], words[3:]
        if words and words[0].startswith("PYTHONPATH="):
            path, words = words[0].removeprefix("PYTHONPATH="), words[1:]
        found = cls(tuple(words), path, folder)
        return found if words and str(found) == text.strip() else None

    def anywhere(self) -> CommandLine:
        """Return the command with a `cd` to the current folder, so that it can be typed in any folder."""
        return self if self.folder else replace(self, folder=str(Path.cwd()))

    def changed(self, values: Mapping[str, object], option: str = "--yes") -> CommandLine:
        """Return the command that runs the whole chain with changed values.

        Args:
            values: argument or setting -> new value.
            option: options to append, such as `--dryrun` or `--rewind 9000 --yes`.
        """
        kept = [word for word in _without_parts(self.words) if word.partition("=")[0] not in values]
        return replace(self, words=(*kept, *(f"{name}={value}" for name, value in values.items()), *option.split()))

    def sibling(self, name: str) -> str:
        """Return the path of another program in the environment of this command."""
        return str(Path(self.words[0]).with_name(name))


def own_program(name: str) -> Path:
    """Return the path of a program of this environment, even if the program is not on PATH."""
    folders = (Path(sys.executable).parent, Path(sysconfig.get_path("scripts")))
    found = next((folder / name for folder in folders if (folder / name).is_file()), shutil.which(name))
    return Path(found or folders[0] / name).absolute()


def shown_program(name: str) -> str:
    """Return how to type a program of this environment: by its name if the shell finds it, otherwise by its path."""
    own, found = own_program(name), shutil.which(name)
    if found and Path(found).absolute() == own:
        return name
    if not own.is_relative_to(Path.cwd()):
        return str(own)
    relative = os.path.relpath(own)
    return relative if os.sep in relative else os.path.join(os.curdir, relative)


def _python() -> str:
    """Return how to type this Python interpreter."""
    own = Path(sys.executable)
    names = ("python", "python3", own.name)
    found = ((name, shutil.which(name)) for name in names)
    # Links to Python in one folder lead to the same interpreter. Links in two environments may also lead to one
    # interpreter, so folders are compared without resolving links.
    known = (name for name, path in found if path and Path(path).parent == own.parent and own.samefile(path))
    return next(known, None) or shown_program(own.name)


def _finds_module(path: str, words: Sequence[str]) -> bool:
    """Return whether PYTHONPATH has this package or a module named in `words` (`module.name` or `module:name`)."""
    named = {name for word in words for name in re.findall(r"(?:^|=)([A-Za-z_]\w*)(?=[.:]\w)", word)}
    named.add(__name__.partition(".")[0])
    folders = [Path(entry) for entry in path.split(os.pathsep) if entry]
    return any((folder / f"{name}.py").is_file() or (folder / name).is_dir() for name in named for folder in folders)


def _without_parts(words: Sequence[str]) -> Iterator[str]:
    rest = iter(words)
    for word in rest:
        option, equals, _ = word.partition("=")
        if option not in _OF_A_PART:
            yield word
        elif _OF_A_PART[option] and not equals:
            next(rest, None)
