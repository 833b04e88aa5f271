"""Find every command that users can read: in pages, in strings of Python files, and in comments of YAML files."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
#: `FIELD` marks a value that a program inserts. `VALUE` replaces this mark, because most options accept `VALUE`.
FIELD, VALUE = "\N{REPLACEMENT CHARACTER}", "8"
_START = r"(?:[A-Z_]+=\S* )*(?:nemo|nemo-upcycle|torchrun|make|python -m (?:nemo_upcycle|benchmarks|tests)\S*)(?: |$)"
_COMMAND = re.compile(_START)
#: Strings in sources that begin like a command but are prose.
_PROSE = re.compile(r"make (?!-C|[a-z-]+(?: [A-Z]+=\S*)*$)|nemo-upcycle (calibration|[^ ]+ with) ")


class Printed(NamedTuple):
    """A command, and the file that prints it."""

    where: str
    line: str

    @property
    def words(self) -> list[str]:
        """The words of the line's first command, with placeholders filled in and without environment variables."""
        words = [word for word in shlex.split(self.line, comments=True) if word != "..."]
        end = next((number for number, word in enumerate(words) if word in ("&&", "|", ">", "#")), None)
        words = [word.replace(FIELD, VALUE) for word in words[:end]]
        while re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        return [re.sub(r"^(N|LENGTH)$", VALUE, word) for word in words]


def tracked(*patterns: str) -> list[Path]:
    """List the files in the repository that match patterns."""
    names = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.splitlines()]


def printed() -> list[Printed]:
    """List all commands, each once per file."""
    found = []
    for path in tracked("*.md", ":!CHANGELOG.md", ":!benchmarks/results/answers*"):
        found += [Printed(str(path.relative_to(ROOT)), line) for line in _of_page(path.read_text(encoding="utf-8"))]
    for path in tracked("nemo_upcycle/*.py", "recipes/*.py", "examples/*.py", "conf/*.yaml", "examples/*.yaml"):
        text = path.read_text(encoding="utf-8")
        texts = _texts(text) if path.suffix == ".py" else [re.sub(r"^# ?", "", text, flags=re.MULTILINE)]
        lines = (line for one in texts for line in (*_inline(one), *_lines(_examples(one))))
        found += [Printed(str(path.relative_to(ROOT)), line) for line in lines if not _PROSE.match(line)]
    return list(dict.fromkeys(found))


def loose() -> list[Printed]:
    """List the messages that print a command with arguments outside backticks, which hides where the command ends."""
    found = []
    pattern = re.compile(rf"(?:nemo-upcycle|nemo upcycle|nemo llm) [a-z]+ (?:{FIELD}|--|[A-Z]{{2,}}\b|[a-z_.]+=)")
    for path in tracked("nemo_upcycle/*.py"):
        for text in _texts(path.read_text(encoding="utf-8")):
            if "\n" not in text and not _COMMAND.match(text) and pattern.search(re.sub(r"`[^`]*`", "", text)):
                found.append(Printed(str(path.relative_to(ROOT)), text))
    return found


def _of_page(text: str) -> Iterator[str]:
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for language, block in fence.findall(text):
        if language in ("bash", "text", ""):
            yield from _lines(block)
    yield from _inline(fence.sub("", text))


def _examples(text: str) -> str:
    """Return the indented lines of a text, or the whole text if it is a single command."""
    indented = "\n".join(line for line in text.splitlines() if line[:1] in (" ", "$"))
    return text if "\n" not in text and " --" in text else indented


def _inline(text: str) -> Iterator[str]:
    """Yield the commands in backticks."""
    for code in re.findall(r"`([^`]+)`", text):
        if _COMMAND.match(line := " ".join(code.split())):
            yield line


def _lines(text: str) -> Iterator[str]:
    """Yield the commands in lines of examples, without the explanation that follows after several blanks."""
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"^\s*(?:\$ |docker run .* nemo-upcycle:\w+ )?", "", line)
        command = re.split(r"\s{2,}#|\s{4,}|\s+\(`", command.strip())[0]
        is_prose = re.search(r"[,.:](?: |$)", command)
        if _COMMAND.match(command) and not is_prose:
            yield command


def _texts(source: str) -> Iterator[str]:
    """Yield the strings of a module, with a mark for each inserted value."""
    inside = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside |= set(map(id, node.values))
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else FIELD for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value
