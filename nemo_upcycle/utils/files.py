"""Write files and folders that are either complete or absent: write aside, rename, then mark.

A folder that took work to make carries a marker, `_SUCCESS.json`, written last; that of a model, which may be
published, is called `nemo_upcycle.json`. Readers check for the marker, so the remains of an interrupted run are never
taken for a result. One process at a time writes a folder: the hidden folder in which the work is done holds a lock.
`streams.py` writes large files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.locks import take_lock


MARKER = "_SUCCESS.json"
#: In the folder of a stage: what it was last started from; in one word, for the shell of a batch job, how it ended
#: without a result (a killed one writes none); and a line for each setting that was changed after a start.
STARTED, ENDED, CHANGES = "_STARTED.json", "_ENDED", "changes.jsonl"
#: The marker of a Hugging Face folder, which may be published: there it says what the model was made of and by.
MODEL_MARKER = "nemo_upcycle.json"
_LOCK = ".lock"
_PLAN = ".plan.json"
_ASIDE = ".half."
_CHUNK_BYTES = 1 << 22


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a hidden sibling of `path` to write; it replaces `path` when the block ends without an error.

    Example:
        >>> with whole_file(Path("runs/demo/report.md")) as aside:  # doctest: +SKIP
        ...     aside.write_text("# demo")
    """
    aside = path.with_name(f".{path.name}{_ASIDE}{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON to `path`, atomically, and wait until it is on the disk; on one line without `indent`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside, aside.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=indent)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())


def clear_unfinished(folder: Path, pattern: str) -> None:
    """Delete the files that a killed process was writing: those of `whole_file`, and those of a pattern."""
    for path in (*folder.glob(f".*{_ASIDE}*"), *folder.glob(pattern)):
        path.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        UpcycleError: the file is missing or unreadable.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, error, "a text file") from None
    except UnicodeDecodeError as error:
        raise UpcycleError(
            str(path), kind="state", got=f"is not UTF-8 text ({error})", fix="convert it with iconv"
        ) from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UpcycleError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error, "a JSON file") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5,000 digits
        raise UpcycleError(
            str(path),
            kind="state",
            got=f"is not valid JSON ({error})",
            fix="restore it, or make it again: it is cut or damaged",
        ) from None


def _unreadable(path: Path, error: OSError, expected: str) -> UpcycleError:
    if isinstance(error, FileNotFoundError):
        return UpcycleError.no_path("file", path)
    return UpcycleError(str(path), kind="state", got=f"cannot be read: {error.strerror}", fix="check the path")


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the address (`path:number`) and the JSON object of every line that is not blank.

    Raises:
        UpcycleError: the file is missing or unreadable, or a line is not a JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UpcycleError(
                f"{path}:{number}",
                kind="state",
                got=f"is not a JSON object: {line[:80]}",
                fix="correct or delete the line",
            )
        yield f"{path}:{number}", value


def is_complete(folder: Path) -> bool:
    """Return whether `folder` holds a finished result."""
    return marker_of(folder).is_file()


def require_complete(folder: Path, what: str, fix: str) -> None:
    """Check that `folder` holds a finished result; `what` names it in the error.

    Raises:
        UpcycleError: it does not.
    """
    if not is_complete(folder):
        raise UpcycleError(
            f"{what.capitalize()} {folder}", kind="state", got=f"is not finished: it has no {MARKER}", fix=fix
        )


def marker_of(folder: Path) -> Path:
    """Return the path of a folder's marker, which need not exist."""
    own = folder / MODEL_MARKER
    return own if own.is_file() else folder / MARKER


def aside_of(target: Path) -> Path:
    """Return the hidden sibling of `target` in which it is made."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def only_writer(target: Path) -> Iterator[Path]:
    """Give the hidden sibling of `target` to work in, to one writer at a time, with what an earlier one left there.

    It replaces `target` when the block ends without an error. On error, the caller cleans up.

    Args:
        target: the folder to make: until then nothing, or an empty folder.

    Raises:
        UpcycleError: another process writes it, or nothing can replace it.
    """
    target = resolved(target)
    if os.path.ismount(target):
        raise UpcycleError(
            str(target),
            kind="refused",
            got="is a mount point, which cannot be replaced",
            fix="name a folder inside it",
        )
    aside = aside_of(target)
    aside.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(aside / _LOCK)
    except (TimeoutError, FileNotFoundError):  # held, or moved to its place with the folder just now
        raise UpcycleError(
            str(target),
            kind="state",
            got="is being written by another process",
            fix="wait for it, or choose another folder",
        ) from None
    with lock:
        yield aside
        aside.rename(target)
        forget_work(target)


def forget_work(folder: Path, *names: str) -> None:
    """Delete what only the making of a folder needed: the lock, and files of these names."""
    for name in (_LOCK, *names):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other runs out of it while the block runs.

    Raises:
        UpcycleError: another run is in it, or it is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UpcycleError(
            str(folder), kind="state", got="is a file, not a folder", fix="choose another name"
        ) from None
    try:
        lock = take_lock(folder / _LOCK)
    except TimeoutError:
        raise UpcycleError(
            str(folder), kind="state", got="is in use by another run", fix="wait for it, or choose another folder"
        ) from None
    with lock:
        yield


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder beside `target`, which is removed in the end, and with it what killed runs left.

    The caller keeps others from making `target` at the same time.
    """
    prefix = f".download-{target.name}_"
    for left in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
        yield Path(folder)


def clear(aside: Path) -> None:
    """Delete what the folder of `only_writer` holds, except for its lock."""
    for path in aside.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


@contextmanager
def output_folder(target: Path, made_by: str | None = None, plan: Any = None) -> Iterator[Path]:
    """Give a folder to write into; it replaces `target` when the block ends without an error.

    The work happens in a hidden sibling of `target`. An error removes it; a kill leaves it for the next call to clear.
    A complete `target` of an earlier run is replaced, and is left untouched when the block fails: it is moved aside
    only while the new one takes its place. A kill at that moment leaves both, and the next call moves it back.

    Args:
        target: the folder to make.
        made_by: who writes it, as the marker will say; then only what `require_replaceable` accepts is replaced.
        plan: plain values that determine the bytes; then the block continues the work of a killed or interrupted call
            with the same plan.

    Raises:
        UpcycleError: another process writes it, or something else is in its place.

    Example:
        >>> with output_folder(Path("runs/demo/hf")) as folder:  # doctest: +SKIP
        ...     (folder / "config.json").write_text("{}")
    """
    target = resolved(target)
    if made_by:
        require_replaceable(target, made_by)
    replaced, is_moved = target.with_name(f".{target.name}.replaced"), False
    try:
        with only_writer(target) as aside:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            if plan is None or not (aside / _PLAN).is_file() or read_json(aside / _PLAN) != plan:
                clear(aside)
            if plan is not None:
                write_json(aside / _PLAN, plan)
            try:
                yield aside
            except BaseException as error:
                # Work based on a user's mistake is not worth keeping.
                if plan is None or isinstance(error, UpcycleError):
                    shutil.rmtree(aside, ignore_errors=True)
                raise
            if made_by:
                require_replaceable(target, made_by)
            (aside / _PLAN).unlink(missing_ok=True)  # the lock stays until the folder is in its place
            if target.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                target.rename(replaced)
                is_moved = True
    except BaseException:
        if is_moved and not target.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def require_replaceable(target: Path, made_by: str) -> None:
    """Check that `target` is absent, an empty folder, or one whose marker names the same maker.

    Stages of the pipeline and the tools for data and models mark their folders, too: those are never replaced.

    Raises:
        UpcycleError: it is something else.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    got = f"holds files that {made_by} did not write"
    if is_complete(target):
        marker = read_json(marker_of(target))
        if isinstance(marker, dict) and marker.get("made_by") == made_by:
            return
        got = f"is a finished folder that {made_by} did not make"
    raise UpcycleError(str(target), kind="state", got=got, fix="choose another name, or remove it first")


def require_apart(target: Path, *inputs: Path) -> None:
    """Check that a folder to write is not an input, contains none and is inside none.

    Raises:
        UpcycleError: it is; writing it could delete or change the input.
    """
    here = resolved(target)
    for path in inputs:
        there = resolved(path)
        if here == there or here in there.parents or there in here.parents:
            raise UpcycleError(
                str(target),
                kind="refused",
                got=f"is the same folder as {path}" if here == there else f"lies inside {path}, or around it",
                fix="choose another name",
            )


def resolved(path: Path) -> Path:
    """Return an absolute path without links; the path need not exist.

    Raises:
        UpcycleError: links form a loop.
    """
    try:
        return path.resolve()
    except (RuntimeError, OSError):
        raise UpcycleError(
            str(path), kind="state", got="has links that form a loop", fix="choose another name"
        ) from None


def require_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Check that `needed_bytes` fit on the disk of `folder` (which need not exist yet).

    Raises:
        UpcycleError: they do not.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise UpcycleError(
            f"Disk of {existing}",
            kind="state",
            got=f"has {size_text(free_bytes)} free, and {what} needs at least {size_text(needed_bytes)}",
            fix="free some space, or choose another folder",
        )


def size_text(count_bytes: float) -> str:
    """Return bytes as GiB, MiB or bytes.

    Example:
        >>> size_text(269030016), size_text(1384073856), size_text(100)
        ('256.6 MiB', '1.29 GiB', '100 bytes')
    """
    if count_bytes >= 2**30:
        return f"{count_bytes / 2**30:.2f} GiB"
    return f"{count_bytes / 2**20:.1f} MiB" if count_bytes >= 2**20 else f"{count_bytes:.0f} bytes"
