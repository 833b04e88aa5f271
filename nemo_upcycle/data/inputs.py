"""Find the files of a blend's sources, and make the engine's plan from them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import SPLITS, Blend, is_pattern
from nemo_upcycle.data.copies import copied_files
from nemo_upcycle.data.engine.encodings import is_plain
from nemo_upcycle.data.engine.tasks import MAX_TASKS
from nemo_upcycle.data.finished import BUILD, TOKENIZER
from nemo_upcycle.data.readers import READERS, InputFile, Place, Reader
from nemo_upcycle.data.suites.suite_config import folders_of_suite
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.cache import cache_folder


#: File for the n-grams of evaluation items, in the build folder.
NGRAMS = "ngrams.npz"
#: Files are joined or cut into tasks of this size; a killed run loses its unfinished tasks.
TASK_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
#: Number of tasks that read texts for each task that searches for equal texts.
TASKS_A_FINDER = 64


def list_inputs(blend: Blend, source: str, work: Path) -> dict[str, list[InputFile]]:
    """Return the files of every split of a source, or their copies if the cache has copies.

    Args:
        blend: the blend.
        source: name of the source.
        work: folder for texts that must be rendered first.

    Raises:
        UpcycleError: the reader or an option is unknown, or an entry matches nothing.
    """
    copied = copied_files(blend, source, cache_folder())
    return list_named(blend, source, work) if copied is None else copied


def list_named(blend: Blend, source: str, work: Path) -> dict[str, list[InputFile]]:
    """Return the files of every split of a source, at the places that the source names; see `list_inputs`."""
    config, reader = blend.config.sources[source], reader_of(blend, source)
    for name in config.options:
        if name not in reader.options:
            raise UpcycleError.unknown(f"option of the reader {reader.name}", name, reader.options)
    entries = {split: getattr(config, split) for split in SPLITS}
    places = {split: Place(blend.folder, blend.config.seed, work / f"{source}.{split}") for split in SPLITS}
    return {
        split: reader.list_files(named, dict(config.options), places[split]) if named else []
        for split, named in entries.items()
    }


def check_files(blend: Blend, source: str) -> dict[str, list[InputFile]]:
    """Return the files of a source, or nothing if they must be fetched or rendered first.

    Raises:
        UpcycleError: see `list_inputs`.
    """
    return {} if reader_of(blend, source).renders else list_inputs(blend, source, Path())


def reader_of(blend: Blend, source: str) -> Reader:
    """Return the reader of a source.

    Raises:
        UpcycleError: there is no such reader.
    """
    name = blend.config.sources[source].reader
    if name not in READERS:
        raise UpcycleError.unknown(f"sources.{source}.reader", name, READERS)
    return READERS[name]


def folders_of(blend: Blend) -> list[Path]:
    """Return the folders on this machine from which a blend reads its YAML file, its texts and its suites.

    Example:
        >>> folders_of(read_blend("/home/me/mine.yaml"))  # of `train: [/texts/*/a.txt]`  # doctest: +SKIP
        [PosixPath('/home/me'), PosixPath('/texts')]
    """
    here = blend.folder.absolute()
    folders = [here] if blend.folder.is_absolute() else []  # a packaged blend has no folder
    for source, config in blend.config.sources.items():
        entries = [entry for split in SPLITS for entry in getattr(config, split)]
        named = reader_of(blend, source).paths(entries, config.options)
        for path in (here / Path(entry).expanduser() for entry in named if "://" not in entry):
            fixed = list(itertools.takewhile(lambda part: not is_pattern(part), path.parts))
            folder = Path(*fixed)
            folders.append(folder if len(fixed) < len(path.parts) or folder.is_dir() else folder.parent)
    folders += [folder for suite, config in blend.suites.items() for folder in folders_of_suite(suite, config)]
    return list(dict.fromkeys(folders))


def require_disjoint(inputs: dict[str, dict[str, list[InputFile]]]) -> None:
    """Check that no file is read twice, by two splits or by two sources.

    Raises:
        UpcycleError: a file is read twice.
    """
    owner: dict[str, str] = {}
    for source, splits in inputs.items():
        for split, files in splits.items():
            for file in files:
                here = f"{source}.{split}"
                if owner.setdefault(file.path, here) != here:
                    raise UpcycleError(
                        f"File {file.path}",
                        kind="refused",
                        got=f"is in both {owner[file.path]} and {here}",
                        fix="remove it from one of them: no text may be trained on twice, or trained on and evaluated",
                    )


def make_plan(
    blend: Blend, inputs: dict[str, dict[str, list[InputFile]]], output: Path, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """Return the engine's plan; held-out files come first, so that the held-out text is kept if texts are equal.

    Args:
        blend: the blend.
        inputs: files of every source and split.
        output: folder of the blend.
        tokenizer: result of `save_tokenizer`.
    """
    config, tasks = blend.config, []
    files = [file for splits in inputs.values() for one in splits.values() for file in one]
    task_bytes = max(TASK_BYTES, 2 * sum(map(_size_of, files)) // MAX_TASKS)
    for split in reversed(SPLITS):
        for name, source in config.sources.items():
            splits = inputs[name]
            has_own = bool(splits["validation"] or splits["heldout"])
            groups, trained = _groups(splits[split], task_bytes), split == "train"
            for group in groups:
                tasks.append(
                    {
                        "source": name,
                        "reader": group[0].reader,
                        "split": split if has_own or not trained else None,
                        "files": [file.path for file in group],
                        "options": _joined_options(group),
                        "max_tokens": math.ceil(source.tokens) if trained and source.tokens else None,
                        "on_hit": source.on_hit,
                        "pii": config.pii if source.pii is None else source.pii,
                    }
                )
    shares = dataclasses.asdict(config.hold_out)
    holds_out = any(task["split"] in SPLITS[1:] or (task["split"] is None and any(shares.values())) for task in tasks)
    return {
        "tokenizer": str((output / TOKENIZER / "tokenizer.json").absolute()),
        "eos_id": tokenizer["eos_id"],
        "vocab_size": tokenizer["vocab_size"],
        "ngram_index": str((output / BUILD / NGRAMS).absolute()) if config.decontaminate else None,
        "seed": config.seed,
        "deduplicate": config.deduplicate,
        "near_duplicates": config.near_duplicates and dataclasses.asdict(config.near_duplicates),
        "finders": 1 + len(tasks) // TASKS_A_FINDER,
        "min_characters": config.min_characters,
        "hold_out": shares,
        "heldout_overlap": config.heldout_overlap if holds_out else None,
        "tasks": tasks,
    }


def _size_of(file: InputFile) -> int:
    return TASK_BYTES if file.size_bytes is None else file.size_bytes


def _groups(files: list[InputFile], task_bytes: int) -> list[list[InputFile]]:
    """Group neighbouring files of one format up to the size of a task, and cut larger files into parts."""
    groups: list[list[InputFile]] = []
    room = 0
    for file in files:
        if len(parts := cut_between_lines(file, task_bytes)) > 1:
            groups += [[part] for part in parts]
            room = 0
            continue
        if not groups or _size_of(file) > room or groups[-1][0].reader != file.reader:
            groups.append([])
            room = task_bytes
        groups[-1].append(file)
        room -= _size_of(file)
    return groups


def cut_between_lines(file: InputFile, most_bytes: int) -> list[InputFile]:
    """Cut a plain file of JSON lines on this machine into even parts for several workers; keep other files whole.

    The file is read once to count its lines, because a document's id contains its line number.

    Args:
        file: file to cut.
        most_bytes: maximum bytes of a part; the part then continues to the end of its last line.
    """
    size_bytes, path = file.size_bytes or 0, Path(file.path)
    if file.reader != "jsonl" or size_bytes <= most_bytes or not path.is_file():
        return [file]
    part_bytes = -(-size_bytes // -(-size_bytes // most_bytes))
    parts: list[InputFile] = []
    start, line = 0, 1
    with path.open("rb") as handle:
        if not is_plain(handle.read(_CHUNK_BYTES)):
            return [file]
        while start < size_bytes:
            handle.seek(start)
            left, lines = part_bytes, 0
            while left and (chunk := handle.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                lines += chunk.count(b"\n")
            while (rest := handle.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            stop = handle.tell()
            options = file.options | {"part": [start, stop, line]}
            parts.append(dataclasses.replace(file, size_bytes=stop - start, options=options))
            start, line = stop, line + lines + bool(rest)
    return parts


def _joined_options(group: list[InputFile]) -> dict[str, Any]:
    """Return the common options of a group's files, and the list of duplicates of each file."""
    options = {name: value for name, value in group[0].options.items() if name != "duplicates"}
    lists = {file.path: file.options["duplicates"] for file in group if "duplicates" in file.options}
    return options | ({"duplicates": lists} if lists else {})
