"""From what a source names to the files that the engine reads: patterns, addresses, years, tasks."""

from __future__ import annotations

import itertools
from pathlib import Path

from nemo_upcycle.data.blend import SPLITS, Blend
from nemo_upcycle.data.readers import READERS, InputFile, Reader
from nemo_upcycle.data.readers.files import GLOB
from nemo_upcycle.errors import UpcycleError


def list_inputs(blend: Blend, source: str, work: Path) -> dict[str, list[InputFile]]:
    """Return the files of every split of a source; a split that nothing is named for has none.

    Args:
        blend: the blend.
        source: name of the source.
        work: where what has to be rendered first is written.

    Raises:
        UpcycleError: there is no such reader or option, or an entry matches nothing.
    """
    config, reader = blend.config.sources[source], reader_of(blend, source)
    for name in config.options:
        if name not in reader.options:
            raise UpcycleError.unknown(f"option of the reader {reader.name}", name, reader.options)
    entries = {split: getattr(config, split) for split in SPLITS}
    return {
        split: reader.list_files(named, blend, dict(config.options), work / f"{source}.{split}") if named else []
        for split, named in entries.items()
    }


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
    """Return the folders of this machine that a blend reads from: its YAML file's, and those of its patterns.

    Example:
        >>> folders_of(read_blend("/home/me/mine.yaml"))  # of `train: [/texts/*/a.txt]`  # doctest: +SKIP
        [PosixPath('/home/me'), PosixPath('/texts')]
    """
    here = blend.folder.absolute()
    folders = [here] if blend.folder.is_absolute() else []  # the package's own has no folder
    for source, config in blend.config.sources.items():
        entries = [entry for split in SPLITS for entry in getattr(config, split)]
        named = reader_of(blend, source).paths(entries, config.options)
        for path in (here / Path(entry).expanduser() for entry in named if "://" not in entry):
            fixed = list(itertools.takewhile(lambda part: not any(mark in part for mark in GLOB), path.parts))
            folder = Path(*fixed)
            folders.append(folder if len(fixed) < len(path.parts) or folder.is_dir() else folder.parent)
    return list(dict.fromkeys(folders))


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
