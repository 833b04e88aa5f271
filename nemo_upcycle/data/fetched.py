"""Fetch everything that runs need from networks into a folder: the caches of their stages, with a list of hashes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

from nemo_upcycle.data.needs import FETCHED, Need
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.cache import CACHE_VARIABLE
from nemo_upcycle.utils.files import in_use, read_json, sha256_file, write_json
from nemo_upcycle.utils.progress import track


logger = logging.getLogger(__name__)
#: What is listed; jobs write other things beside these, and below `hf` the hub's library its logs.
_PARTS = ("assets", "packages", "texts", "hf/hub", "hf/datasets", "hf/modules")


@dataclass
class Fetched:
    """A folder that was filled.

    Attributes:
        fetched: what is in it, by name: `place` it came from, and `license`.
        files: below the folder, by path: hex sha256.
        failed: what could not be fetched, by name: why.
    """

    fetched: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def variables_of(folder: Path) -> dict[str, str]:
    """Return the environment variables with which processes keep in a folder what they fetch, and find it there."""
    return {CACHE_VARIABLE: str(folder), "HF_HOME": str(folder / "hf")}


def read_fetched(folder: Path) -> Fetched:
    """Read the list of what fills a folder; a new one has nothing.

    Raises:
        UpcycleError: the list is damaged.
    """
    path = folder / FETCHED
    if not path.is_file():
        return Fetched()
    try:
        content = read_json(path)
        return Fetched(*({**content[part.name]} for part in fields(Fetched)))
    except (UpcycleError, KeyError, TypeError):
        fix = "remove it and fetch again: files that are there stay"
        raise UpcycleError(str(path), got="damaged", expected="as this command wrote it", fix=fix) from None


def find_damaged(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """Return the files that are not what was listed, by path: `missing` or `changed`."""
    damaged = {}
    for name, digest in track(files.items(), f"check {folder}", len(files)):
        path = folder / name
        if not path.is_file():
            damaged[name] = "missing"
        elif _digest(path) != digest:
            damaged[name] = "changed"
    return damaged


def fill(folder: Path, needs: Sequence[Need]) -> Fetched:
    """Fetch what is not there yet, and list every file with its hash; what an earlier call left half is continued.

    Args:
        folder: the folder; the process has its `variables_of`.
        needs: what to fetch. What cannot be fetched is reported, and keeps nothing else from being fetched.

    Returns:
        What the folder holds now.

    Raises:
        UpcycleError: another process fills it, or its list is damaged.
    """
    with in_use(folder):
        earlier = read_fetched(folder)
        for name, how in find_damaged(folder, earlier.files).items():
            logger.warning("%s: %s, fetched again", folder / name, how)
            _remove(folder, name)
        now = Fetched(earlier.fetched, earlier.files)
        for number, need in enumerate(needs, 1):
            logger.info("[%d of %d] %s, from %s", number, len(needs), need.what, need.place)
            try:
                need.fetch()
            except UpcycleError as error:
                now.failed[need.what] = str(error)
                now.fetched.pop(need.what, None)
            else:
                now.fetched[need.what] = {"place": need.place, "license": need.license}
        names = list(_files_in(folder))
        now.files |= {name: _digest(folder / name) for name in track(names, f"hash {folder}", len(names))}
        write_json(folder / FETCHED, asdict(now))
    return now


def _files_in(folder: Path) -> Iterator[str]:
    """Yield the files that are listed. The hub's cache has each under the name of its content, and a link to that."""
    for part in _PARTS:
        for path in sorted((folder / part).rglob("*")):
            parts = path.relative_to(folder).parts
            if path.is_file() and not _is_passing(parts):
                yield "/".join(parts)


def _is_passing(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part.endswith(".lock") or part in ("blobs", "__pycache__") for part in parts)


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_of(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _digest_of(path: Path, *_: int) -> str:
    return sha256_file(path)


def _remove(folder: Path, name: str) -> None:
    """Remove a damaged file, and what counts as complete because of it, so that it is fetched again."""
    parts = name.split("/")
    shared = {"assets": 2, "hf/datasets": 3, "hf/modules": 3}
    depth = shared.get(parts[0]) or shared.get("/".join(parts[:2]))
    path = folder.joinpath(*parts[:depth])
    if path.is_dir():
        shutil.rmtree(path)
        return
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
