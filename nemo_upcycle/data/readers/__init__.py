"""The readers of a blend's sources, one file each; every module in this folder is imported.

A `Reader`, which a blend names with `reader:`, turns the entries of a source into files. A `Format` yields the
documents of such a file inside the engine. At the top, a module imports only packages that both environments have.
Packages that only one of the two environments has (the engine's: orjson, pyarrow; the other: lm-eval) are imported
inside functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

from nemo_upcycle.data.engine.encodings import COMPRESSED
from nemo_upcycle.data.needs import Need


#: Output of a format: the line or row (from 1), its bytes (None means the rest of the file), and the object or the
#: mistake.
Records = Iterator[tuple[int, "int | None", "dict[str, Any] | str"]]
#: Reason for losing a record without a text; the name of the missing field follows this reason.
NO_FIELD = "no field"


@dataclass(frozen=True)
class InputFile:
    """One file that the engine reads.

    Attributes:
        path: absolute path, or address that fsspec opens.
        reader: key of `FORMATS`.
        size_bytes: size on disk; None if the size is unknown until the file is opened.
        options: options of the format.
    """

    path: str
    reader: str
    size_bytes: int | None
    options: dict[str, Any] = field(default_factory=dict)


def input_file(path: Path, reader: str) -> InputFile:
    """Return the entry of a file on this machine, without options."""
    return InputFile(str(path.absolute()), reader, path.stat().st_size)


class Place(NamedTuple):
    """The parts of a blend that a reader needs: folder of relative paths, seed, and folder to render into."""

    folder: Path
    seed: int
    work: Path


class Reader(ABC):
    """A reader turns the entries of a source into files."""

    #: name in a blend, and options that a source may set
    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    #: whether files must be fetched or rendered before they can be listed
    renders: ClassVar[bool] = False

    @abstractmethod
    def list_files(self, entries: list[str], options: dict[str, Any], at: Place) -> list[InputFile]:
        """Return the files of one split.

        Args:
            entries: files or patterns that the source names for the split; not empty.
            options: values that the source sets for `self.options`.
            at: the blend's folder and seed, and the folder to render into.

        Raises:
            UpcycleError: an entry matches nothing, or an option is wrong.
        """

    def paths(self, entries: list[str], options: Mapping[str, Any]) -> list[str]:
        """Return the paths, patterns and addresses to read; an empty list for a reader that renders texts."""
        return [] if self.renders else entries

    def needs(self, entries: list[str], options: Mapping[str, Any]) -> list[Need]:
        """List what must be fetched from a network, except for the addresses among `paths`."""
        return []


class Format(ABC):
    """A format reads the documents of a file: the whole file is a document, or each line or row is a document."""

    name: ClassVar[str]
    #: suffixes of the files for which the reader `files` uses this format
    suffixes: ClassVar[tuple[str, ...]] = ()
    #: whether a file is one document
    is_document: ClassVar[bool] = False
    #: default options; if they lack `text_key` or `id_key`, the default is "text" or "id"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def read(self, file: str, options: Mapping[str, Any]) -> Records:
        """Yield the records of a file; only the damaged parts of a file are lost.

        Args:
            file: path or fsspec URL.
            options: options of the task, which override `defaults`.

        Raises:
            OSError: there is no such file.
            OtherFormatError: the file has another format.
        """


READERS: dict[str, Reader] = {}
FORMATS: dict[str, Format] = {}

_Kind = TypeVar("_Kind", bound="type[Reader] | type[Format]")


def register(kind: _Kind) -> _Kind:
    """Register a reader or a format under its name; use this as a decorator of its class."""
    table: dict[str, Any] = READERS if issubclass(kind, Reader) else FORMATS
    table[kind.name] = kind()
    return kind


def format_of(path: str) -> str | None:
    """Return the name of the format that matches a file's suffix, or None."""
    ends = {end: format.name for format in FORMATS.values() for end in format.suffixes}
    return ends.get(suffix_of(path))


def suffix_of(path: str) -> str:
    """Return the suffix of a file's name that tells its format, compression included; "" if there is none."""
    ends = (end for format in FORMATS.values() for end in format.suffixes if path.endswith(end))
    return max(ends, key=len, default="")


def readable() -> str:
    """Describe the suffixes of readable files."""
    ends = {end for format in FORMATS.values() for end in format.suffixes if not end.endswith(COMPRESSED)}
    return f"{', '.join(sorted(ends, key=len))}, compressed or not"


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
