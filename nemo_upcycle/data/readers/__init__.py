"""The readers of a blend's sources, one file each; every module in this folder is imported.

A `Reader`, which a blend names with `reader:`, turns the entries of a source into files. A `Format` yields the
documents of such a file inside the engine. A module imports at the top only packages of both environments; those of
the engine's environment alone (orjson, pyarrow), and those that it lacks (lm-eval), are imported inside functions.
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


#: What a format gives: the line or row from 1, its bytes (None: all that the file has left), and the object there or
#: what is wrong with it.
Records = Iterator[tuple[int, "int | None", "dict[str, Any] | str"]]
#: Why a record without a text is lost; the name of the field follows.
NO_FIELD = "no field"


@dataclass(frozen=True)
class InputFile:
    """One file that the engine reads.

    Attributes:
        path: absolute, or an address that fsspec opens.
        reader: a key of `FORMATS`.
        size_bytes: size on disk; None if only opening the file would tell.
        options: options of the format.
    """

    path: str
    reader: str
    size_bytes: int | None
    options: dict[str, Any] = field(default_factory=dict)


def input_file(path: Path, reader: str) -> InputFile:
    """Describe a file of this machine that has no options."""
    return InputFile(str(path.absolute()), reader, path.stat().st_size)


class Place(NamedTuple):
    """What a reader needs of a blend: the folder where relative paths start, its seed, and a folder to render into."""

    folder: Path
    seed: int
    work: Path


class Reader(ABC):
    """How the entries of a source become files."""

    #: what a blend calls it, and the options that it takes there
    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    #: whether its files have to be fetched or rendered before they can be listed
    renders: ClassVar[bool] = False

    @abstractmethod
    def list_files(self, entries: list[str], options: dict[str, Any], at: Place) -> list[InputFile]:
        """Return the files of one split.

        Args:
            entries: files or patterns that the source names for the split; not empty.
            options: the source's values for `self.options`, as far as it gives any.
            at: the blend's folder and seed, and the folder to render into.

        Raises:
            UpcycleError: an entry matches nothing, or an option is wrong.
        """

    def paths(self, entries: list[str], options: Mapping[str, Any]) -> list[str]:
        """Return the paths, patterns and addresses that it reads; none for a reader that renders texts."""
        return [] if self.renders else entries

    def needs(self, entries: list[str], options: Mapping[str, Any]) -> list[Need]:
        """List its needs from a network, beside the addresses among `paths`."""
        return []


class Format(ABC):
    """How the documents of a file are read; a file is one document, or each of its lines or rows is."""

    name: ClassVar[str]
    #: ends of the names of the files that the reader `files` has it read
    suffixes: ClassVar[tuple[str, ...]] = ()
    #: whether a file is one document
    is_document: ClassVar[bool] = False
    #: options where a task gives none; without these, `text_key` is "text" and `id_key` "id"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def read(self, file: str, options: Mapping[str, Any]) -> Records:
        """Yield what is in a file; what is damaged costs only itself.

        Args:
            file: a path or fsspec URL.
            options: options of the task, over `defaults`.

        Raises:
            OSError: there is no such file.
            OtherFormatError: its bytes are of another format.
        """


READERS: dict[str, Reader] = {}
FORMATS: dict[str, Format] = {}

_Kind = TypeVar("_Kind", bound="type[Reader] | type[Format]")


def register(kind: _Kind) -> _Kind:
    """Make a reader or a format known by its name: a decorator of its class."""
    table: dict[str, Any] = READERS if issubclass(kind, Reader) else FORMATS
    table[kind.name] = kind()
    return kind


def format_of(path: str) -> str | None:
    """Return the name of the format that the name of a file ends in; None if it ends in none."""
    ends = {end: format.name for format in FORMATS.values() for end in format.suffixes}
    return ends.get(suffix_of(path))


def suffix_of(path: str) -> str:
    """Return the end of a file's name that says its format, compression included; "" if it says none."""
    ends = (end for format in FORMATS.values() for end in format.suffixes if path.endswith(end))
    return max(ends, key=len, default="")


def readable() -> str:
    """List the ends of the names of files that are read."""
    ends = {end for format in FORMATS.values() for end in format.suffixes if not end.endswith(COMPRESSED)}
    return f"{', '.join(sorted(ends, key=len))}, compressed or not"


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
