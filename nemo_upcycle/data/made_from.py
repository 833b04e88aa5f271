"""Compare the files from which a folder of texts or conversations was made with the files that exist now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.cache import writable_cache
from nemo_upcycle.utils.locks import take_lock


#: Path, size and time of a file.
Stamp = Sequence[Any]
#: Maximum number of files of each kind that a message names.
_NAMED = 3


def named_tokenizer(tokenizer: str | None) -> str:
    """Return the dense model whose tokenizer is used.

    Raises:
        UpcycleError: the configuration names no dense model.
    """
    if tokenizer is None:
        expected = "the data are made with the tokenizer and chat template of the dense model"
        raise UpcycleError(
            "The tokenizer",
            kind="missing",
            got="is missing",
            expected=expected,
            fix="add tokenizer=FOLDER, or tokenizer=hf://ORG/NAME",
        )
    return tokenizer


def stamps(paths: Iterable[Path]) -> list[Stamp]:
    """Return path, size and time of files, so that a file replaced under the same name is noticed."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def compare(before: Iterable[Stamp], now: Iterable[Stamp]) -> dict[str, list[str]]:
    """Find the files that are `new`, `gone` or `changed`; kinds without files are omitted.

    Example:
        >>> compare([["a", 3, 1], ["b", 3, 1]], [["b", 4, 2], ["c", 3, 1]])
        {'new': ['c'], 'gone': ['a'], 'changed': ['b']}
    """
    then, there = ({path: state for path, *state in files} for files in (before, now))
    found = {
        "new": [path for path in there if path not in then],
        "gone": [path for path in then if path not in there],
        "changed": [path for path, state in then.items() if there.get(path, state) != state],
    }
    return {how: paths for how, paths in found.items() if paths}


def changes_text(changes: Mapping[str, Sequence[str]], output: Path) -> str:
    """Describe which files are new, gone or changed, with the names of the first files.

    Example:
        >>> changes_text({"new": ["/texts/a.txt", "/texts/b.txt"]}, Path("data"))
        '2 input files are new (/texts/a.txt, /texts/b.txt) since data was built'
    """
    kinds = []
    for how, paths in changes.items():
        more = f", and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        files = "input files are" if len(paths) > 1 else "input file is"
        kinds.append(f"{len(paths):,} {files} {how} ({', '.join(paths[:_NAMED])}{more})")
    return f"{', '.join(kinds)} since {output} was built"


def require_same(output: Path, kind: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a folder that was made from other settings or files.

    Args:
        output: folder to check.
        kind: `blend` or `chat`, the key of the settings in `earlier` and `now`.
        earlier: record of the settings with which the folder was made; empty if the folder contains something else.
        now: record of the present settings, with the keys `format`, `blend` or `chat`, `strict` and, for
            conversations, `files`.

    Raises:
        UpcycleError: the folder has another format or kind, or was made from other settings or files.
    """
    if earlier == now:
        return
    if kind in earlier and earlier["format"] != now["format"]:
        raise UpcycleError(
            f"format of {output}",
            got=earlier["format"],
            expected=now["format"],
            fix="remove the folder, which an earlier version made, or choose another one",
        )
    got, fix = f"holds files that are not a {kind}", "choose another folder, or remove it first"
    if kind in earlier:
        were, are = ({**noted[kind], "strict": noted["strict"]} for noted in (earlier, now))
        names = [key for key, value in are.items() if were.get(key) != value]
        differs = [f"{', '.join(names)} differ"] if names else []
        if changes := compare(earlier.get("files", []), now.get("files", [])):
            differs.append(changes_text(changes, output))
        got, fix = f"holds another {kind} ({'; '.join(differs)})", f"use the settings of that {kind}, {fix}"
    raise UpcycleError(str(output), kind="state", got=got, fix=fix)


def cached_folder(kind: str, name: str, made_from: Sequence[Any], build: Callable[[Path], object]) -> Path:
    """Return a folder in the cache; build it on first use.

    Several ranks may call this at the same time: one builds the folder, the others wait.

    Args:
        kind: folder in the cache, `blends` or `chats`.
        name: name of the blend or the conversations.
        made_from: plain values that determine the content.
        build: function that makes the folder at a path, or keeps a finished folder.

    Raises:
        UpcycleError: `build` failed.
    """
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    output = writable_cache(kind) / f"{name}-{digest}"
    with take_lock(Path(f"{output}.lock"), timeout_s=-1):
        build(output)
    return output
