"""Files that are either complete or absent: write aside, rename, then mark.

A folder that took work to make carries a marker, `_SUCCESS.json`, written last. Whoever reads the folder
asks for the marker, so the remains of an interrupted run are never taken for a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError, problem


MARKER = "_SUCCESS.json"
_CHUNK_BYTES = 1 << 22


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=2, sort_keys=False)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    aside.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UpcycleError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UpcycleError(
            problem(str(path), got="no such file", expected="a JSON file", fix="check the path")
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UpcycleError(
            problem(str(path), got=f"unreadable JSON ({error})", expected="valid JSON", fix="write the file again")
        ) from None


def is_complete(folder: Path) -> bool:
    """Return whether `folder` holds a finished result."""
    return (folder / MARKER).is_file()


@contextmanager
def output_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into, and put it in the place of `target` when the block ends without an error.

    The work happens in a hidden sibling of `target`. An error removes it; a kill leaves it for the next call to clear.
    A complete `target` of an earlier run is replaced, and is left untouched when the block fails.

    Args:
        target: the folder that shall exist afterwards.

    Example:
        >>> with output_folder(Path("runs/demo/hf")) as folder:  # doctest: +SKIP
        ...     (folder / "config.json").write_text("{}")
    """
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)


def require_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Check that `needed_bytes` fit on the disk of `folder` (which need not exist yet).

    Raises:
        UpcycleError: they do not.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise UpcycleError(
            problem(
                f"disk space for {what} in {existing}",
                got=f"{free_bytes / 2**30:.2f} GiB free",
                expected=f"at least {needed_bytes / 2**30:.2f} GiB",
                fix="free some space or choose another folder",
            )
        )
