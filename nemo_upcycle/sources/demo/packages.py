"""Fetch real text from packages of Debian or Ubuntu: documentation and dictionaries."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.cache import writable_cache
from nemo_upcycle.utils.files import scratch_folder, whole_file
from nemo_upcycle.utils.locks import take_lock


#: Articles of a dictionary are joined into documents of this length (characters).
_DOCUMENT_CHARACTERS = 4000
_ARTICLE = re.compile(r"\n(?=\S)")
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")


def package_texts(name: str) -> Path:
    """Return the texts of a package as JSON lines (`id`, `text`), fetched with apt-get on first use.

    Each `.txt` file is one document, including source files of Sphinx pages. The articles of a dictionary are joined
    into documents of about 4,000 characters. Nothing is installed, and no script of the package is run.

    Args:
        name: name of the package in apt.

    Raises:
        UpcycleError: apt-get or dpkg-deb is missing, the package is unknown, or it contains no text.

    Example:
        >>> package_texts("dict-gcide").name  # doctest: +SKIP
        'dict-gcide.jsonl'
    """
    if not _NAME.fullmatch(name):
        raise UpcycleError("package", got=repr(name), expected="a name like dict-gcide", fix="correct the name")
    path = writable_cache("packages") / f"{name}.jsonl"
    with take_lock(Path(f"{path}.lock"), timeout_s=-1):
        if not path.is_file():
            _write(name, path)
    return path


def _write(name: str, path: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if not which(tool):
            raise UpcycleError(
                f"{tool}",
                kind="missing",
                got="is not installed",
                expected="packages of texts come from Debian or Ubuntu",
                fix="use a blend of your own files",
            )
    with scratch_folder(path) as folder:
        _run(name, ["apt-get", "-qq", "download", name], folder)
        packages = list(folder.glob(f"{name}_*.deb"))
        if len(packages) != 1:  # if no package has the name, apt reads dots in it as wildcards
            raise UpcycleError(
                f"Package {name}",
                kind="state",
                got=f"matches {len(packages)} downloaded files, not one",
                fix="correct the name",
            )
        package = packages[0]
        _run(name, ["dpkg-deb", "-x", package.name, "files"], folder)
        documents = 0
        with whole_file(path) as aside, aside.open("w", encoding="utf-8") as handle:
            for identity, text in _documents(folder / "files"):
                documents += 1
                line = {"id": f"{package.stem}/{identity}", "text": text}
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            if not documents:
                raise UpcycleError(
                    f"Package {name}",
                    kind="state",
                    got="holds no texts (.txt or .dict.dz)",
                    fix="name another package",
                )


def _run(name: str, command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        message = " ".join(done.stderr.split())[:300]
        raise UpcycleError(
            f"Package {name}",
            kind="state",
            got=f"could not be downloaded ({command[0]}: {message})",
            fix="correct the name (releases name packages differently), run `apt-get update`, or check the network",
        )


def _documents(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.txt")):
        if path.is_file() and not path.is_symlink():
            yield str(path.relative_to(folder)), path.read_text(encoding="utf-8", errors="replace")
    for path in sorted(folder.rglob("*.dict.dz")):
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as handle:
            for number, text in enumerate(_joined(_ARTICLE.split(handle.read())), 1):
                yield f"{path.relative_to(folder)}/{number}", text


def _joined(articles: list[str]) -> Iterator[str]:
    joined: list[str] = []
    for article in articles:
        joined.append(article)
        if sum(map(len, joined)) >= _DOCUMENT_CHARACTERS:
            yield "\n".join(joined)
            joined = []
    if joined:
        yield "\n".join(joined)
