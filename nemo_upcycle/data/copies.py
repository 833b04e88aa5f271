"""Cached copies of files that a source names by address; a build reads the copies if there are any."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import SPLITS, Blend, SourceConfig
from nemo_upcycle.data.engine.lines import NOT_THERE, is_address, open_input
from nemo_upcycle.data.readers import InputFile
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json, require_disk, whole_file, write_json
from nemo_upcycle.utils.progress import track


logger = logging.getLogger(__name__)
_AT_ONCE = 8


def _list_of(blend: Blend, source: str, cache: Path) -> Path:
    """Return the path of the list of a source's files; the path depends on the entries, the options and the seed."""
    config = blend.config.sources[source]
    entries = [getattr(config, split) for split in SPLITS]
    named: list[Any] = [config.reader, entries, config.options, blend.config.seed]
    return cache / "texts" / f"{hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]}.json"


def copied_files(blend: Blend, source: str, cache: Path) -> dict[str, list[InputFile]] | None:
    """Return the copied files of every split of a source; None if its present entries were not copied."""
    path = _list_of(blend, source, cache)
    if not path.is_file():
        return None
    return {
        split: [_moved(InputFile(**file), lambda name: str(path.parent / name)) for file in files]
        for split, files in read_json(path).items()
    }


def copy_files(blend: Blend, source: str, files: Mapping[str, list[InputFile]], cache: Path) -> None:
    """Copy the missing files of a source into the cache, and write the list of all its files.

    Args:
        blend: the blend.
        source: name of the source.
        files: files of every split, as its reader lists them.
        cache: folder of the cache.

    Raises:
        UpcycleError: the source states no licence, or a file cannot be read.
    """
    if (stated := blend.config.sources[source].license) == SourceConfig.license:
        raise UpcycleError(
            f"License of source {source} in blend {blend.name}",
            kind="missing",
            got=f"is {stated}, and copying the texts needs one",
            fix="state it in the blend, or copy the files yourself and name the copies there",
        )
    path = _list_of(blend, source, cache)
    listed = [file for split in files.values() for file in split]
    new = [file for file in listed if not (path.parent / _place(file.path)).is_file()]
    require_disk(cache, sum(file.size_bytes or 0 for file in new), f"source {source}")
    addresses = sorted({name for file in listed for name in _names(file) if is_address(name)})
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in track(pool.map(partial(_copy, path.parent), addresses), f"copy {source}", len(addresses)):
            pass
    write_json(path, {split: [asdict(_moved(file, _place)) for file in files[split]] for split in files})


def _names(file: InputFile) -> Iterator[str]:
    """Yield the path or address of a file, and of RedPajama's list of duplicates for this file, if there is a list."""
    yield file.path
    if "duplicates" in file.options:
        yield file.options["duplicates"]


def _moved(file: InputFile, place: Callable[[str], str]) -> InputFile:
    """Return a file with `place` applied to its path and to the path of its list of duplicates."""
    options = {name: place(value) if name == "duplicates" else value for name, value in file.options.items()}
    return replace(file, path=place(file.path), options=options)


def _place(name: str) -> str:
    """Return the path of an address's copy below the folder of copies; return a path unchanged.

    Example:
        >>> _place("https://example.org/a/b.jsonl")
        'https/example.org/a/b.jsonl'
    """
    if not is_address(name):
        return name
    return "/".join(part for part in name.replace(":", "", 1).split("/") if part not in ("", ".", ".."))


def _copy(folder: Path, address: str) -> None:
    path = folder / _place(address)
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_input(address) as handle, whole_file(path) as aside, aside.open("wb") as copy:
            shutil.copyfileobj(handle, copy, 1 << 22)
    except NOT_THERE:
        logger.warning("%s does not exist; the build counts it as missing", address)
