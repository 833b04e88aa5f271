"""Write files and folders that are either complete or absent: write to a hidden sibling, then rename the sibling.

A folder that took work to make contains a marker, `_SUCCESS.json`, which is written last. The marker of a model folder
is called `nemo_upcycle.json`, because such a folder may be published. Readers check for the marker, so the remains of
an interrupted run are never taken for a result. A lock in the hidden folder lets only one process at a time write a
folder. `streams.py` writes large files.
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
#: Files in the folder of a stage. STARTED: the inputs of its last start. ENDED: one word that tells a batch job's
#: shell how the stage ended without a result (a killed stage writes no file). CHANGES: one line for each setting that
#: was changed after a start.
STARTED, ENDED, CHANGES = "_STARTED.json", "_ENDED", "changes.jsonl"
#: The marker of a Hugging Face folder. The folder may be published, so the marker also says from which inputs and by
#: which program the model was made.
MODEL_MARKER = "nemo_upcycle.json"
_LOCK = ".lock"
_PLAN = ".plan.json"
_ASIDE = ".half."
_CHUNK_BYTES = 1 << 22


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex; read the file in 4 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling of `path` to write, and rename it to `path` if the block ends without an error.

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
    """Write JSON atomically and wait until it is on the disk; write a single line if `indent` is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside, aside.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=indent)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())


def clear_unfinished(folder: Path, pattern: str) -> None:
    """Delete unfinished files of a killed process: hidden siblings of `whole_file`, and files that match a pattern."""
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
            fix="restore the file, or make it again: it is truncated or damaged",
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
    """Check that `folder` holds a finished result; `what` names the result in the error.

    Raises:
        UpcycleError: the folder has no marker.
    """
    if not is_complete(folder):
        raise UpcycleError(
            f"{what.capitalize()} {folder}", kind="state", got=f"is not finished: it has no {MARKER}", fix=fix
        )


def marker_of(folder: Path) -> Path:
    """Return the path of a folder's marker, even if the marker does not exist."""
    own = folder / MODEL_MARKER
    return own if own.is_file() else folder / MARKER


def aside_of(target: Path) -> Path:
    """Return the hidden sibling in which the folder `target` is made."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def only_writer(target: Path) -> Iterator[Path]:
    """Yield the hidden sibling of `target` as a work folder for one writer at a time.

    Files that an earlier writer left in the work folder are kept. The work folder replaces `target` if the block ends
    without an error. On error, the caller cleans up.

    Args:
        target: folder to make; it must be missing or empty when the block ends.

    Raises:
        UpcycleError: another process writes `target`, or `target` is a mount point and cannot be replaced.
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
    except (TimeoutError, FileNotFoundError):  # the lock is held, or was moved just now with the finished folder
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
    """Delete files that were needed only while a folder was made: the lock, and the files `names`."""
    for name in (_LOCK, *names):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Create a folder, and keep other runs out of the folder while the block runs.

    Raises:
        UpcycleError: another run uses the folder, or a file is at the folder's path.
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
    """Yield a hidden folder beside `target`, and remove it at the end.

    Hidden folders of killed runs are removed first. The caller makes sure that no other process makes `target`
    at the same time.
    """
    prefix = f".download-{target.name}_"
    for left in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
        yield Path(folder)


def clear(aside: Path) -> None:
    """Empty a work folder of `only_writer`, but keep its lock."""
    for path in aside.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


@contextmanager
def output_folder(target: Path, made_by: str | None = None, plan: Any = None) -> Iterator[Path]:
    """Yield a folder to write into, and rename it to `target` if the block ends without an error.

    The work happens in a hidden sibling of `target`. An error removes the sibling. A kill leaves the sibling, and the
    next call clears it. A complete `target` of an earlier run stays untouched if the block fails. If the block
    succeeds, the old folder is moved aside while the new folder takes its place. A kill at that moment leaves both
    folders, and the next call moves the old folder back.

    Args:
        target: folder to make.
        made_by: name of the writer, as in the marker; if given, only a folder that `require_replaceable` accepts is
            replaced.
        plan: plain values that determine the bytes; if given, the block continues the work of a killed or interrupted
            call with the same plan.

    Raises:
        UpcycleError: another process writes `target`, or `target` must not be replaced.

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
                # Keep unfinished work for the next call, unless there is no plan or the user made a mistake.
                if plan is None or isinstance(error, UpcycleError):
                    shutil.rmtree(aside, ignore_errors=True)
                raise
            if made_by:
                require_replaceable(target, made_by)
            (aside / _PLAN).unlink(missing_ok=True)  # `only_writer` deletes the lock after it has moved the folder
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
    """Check that `target` is missing, an empty folder, or a folder whose marker names the same maker.

    Stages of the pipeline and the tools for data and models mark their folders, too. A folder of another maker is
    never replaced.

    Raises:
        UpcycleError: `target` is something else.
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
    """Check that an output folder is no input, contains no input and is inside no input.

    Otherwise writing the folder could delete or change the input.

    Raises:
        UpcycleError: the output folder and an input overlap.
    """
    here = resolved(target)
    for path in inputs:
        there = resolved(path)
        if here == there or here in there.parents or there in here.parents:
            raise UpcycleError(
                str(target),
                kind="refused",
                got=f"is the same folder as {path}" if here == there else f"lies inside {path}, or contains it",
                fix="choose another name",
            )


def resolved(path: Path) -> Path:
    """Return an absolute path with links resolved, even if the path does not exist.

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
    """Check that `needed_bytes` fit on the disk of `folder`, even if the folder does not exist yet.

    Raises:
        UpcycleError: the disk has too little free space.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise UpcycleError(
            f"The disk of {existing}",
            kind="state",
            got=f"has {size_text(free_bytes)} free, and {what} needs at least {size_text(needed_bytes)}",
            fix="free some space, or choose another folder",
        )


def size_text(count_bytes: float) -> str:
    """Format a number of bytes in GiB, MiB or bytes.

    Example:
        >>> size_text(269030016), size_text(1384073856), size_text(100)
        ('256.6 MiB', '1.29 GiB', '100 bytes')
    """
    if count_bytes >= 2**30:
        return f"{count_bytes / 2**30:.2f} GiB"
    return f"{count_bytes / 2**20:.1f} MiB" if count_bytes >= 2**20 else f"{count_bytes:.0f} bytes"
