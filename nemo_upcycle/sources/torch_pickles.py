"""What `torch.save` and torch_dist checkpoints pickle, read without the classes and functions that the pickles name.

What a pickle names is inert (`Inert`), but for a few types that nobody can change: nothing that it builds, calls or
changes is torch's, Python's or this package's.

`.metadata` of a torch_dist checkpoint says which piece of which tensor lies where. A piece is one tensor as
`torch.save` writes it, somewhere in a file: an uncompressed zip archive of a small pickle, which describes the tensor,
and of the numbers as they are.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.mapped_files import MappedFiles, Stored
from nemo_upcycle.utils.dtypes import dtype_name


#: What opening a damaged or foreign piece leads to.
DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Inert:
    """Stands in for a class or function that a pickle names: keeps what it is given, and does nothing with it.

    A pickle can set attributes of whatever it has imported. Of this class it cannot: `__setstate__` takes that over,
    and has no instance there. The items of a list or dict of another class are ignored.
    """

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Ignore an item."""


class _Metadata(Inert):
    """Stand-in for torch's class and for Megatron's subclass of it."""

    state_dict_metadata: dict[str, Any]
    storage_data: dict[Any, Any]


class _Properties(Inert):
    """Stand-in for a tensor's properties, whose values torch saves in order."""

    dtype: Any

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


#: What stands in for what a pickle names; `Inert` for everything else. Python and torch do not let anyone change the
#: types and values among them.
_STANDS_IN: dict[str, Any] = {
    "torch.distributed.checkpoint.metadata.Metadata": _Metadata,
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": _Metadata,
    "torch.distributed.checkpoint.metadata.TensorProperties": _Properties,
    "torch.Size": tuple,
    "collections.OrderedDict": dict,
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, slice)},
    **{f"torch.{dtype_name(dtype)}": dtype for dtype in torch.storage._dtype_to_storage_type_map()},
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _STANDS_IN.get(f"{module}.{name}", Inert)

    def persistent_load(self, pid: Any) -> Any:
        return pid  # says where a tensor's numbers are


def read_saved(path: Path) -> Any:
    """Read what `torch.save` wrote, without tensors and without running anything: dicts, lists, numbers, texts.

    Raises:
        OSError, ValueError: it cannot be read, or is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(one for one in archive.infolist() if one.filename.endswith("/data.pkl"))
            with archive.open(member) as handle:
                return _InertUnpickler(handle).load()
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever a damaged pickle leads to
        raise ValueError(f"damaged ({type(error).__name__})") from None


@dataclass(frozen=True)
class FileSpan:
    """The bytes of a file that hold a piece of a tensor; `transforms` says how they are compressed, None for not."""

    file: str
    offset: int
    length: int
    transforms: Any


def read_metadata(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, tuple[int, ...]], FileSpan], str]:
    """Return the tensors, the spans of their pieces by name and offset, and the sha256 of the file."""
    path = folder / ".metadata"
    if not path.is_file():
        raise CheckpointError(
            str(folder),
            kind="missing",
            got="has no .metadata, so it is not a finished Megatron distributed checkpoint",
            fix="give the weights folder of a finished checkpoint",
        )
    try:
        raw = path.read_bytes()
        metadata = _InertUnpickler(io.BytesIO(raw)).load()
        if not isinstance(metadata, _Metadata):
            raise pickle.UnpicklingError(f"a {type(metadata).__name__}")
        return _tensors_of(metadata), _spans_of(metadata), hashlib.sha256(raw).hexdigest()
    except OSError:
        raise
    except Exception as error:  # whatever a damaged pickle leads to
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            str(path), kind="state", got=f"cannot be read as torch_dist metadata ({reason})", fix="copy it again"
        ) from None


def _tensors_of(metadata: _Metadata) -> dict[str, Any]:
    return {name: entry for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "chunks")}


def _spans_of(metadata: _Metadata) -> dict[tuple[str, tuple[int, ...]], FileSpan]:
    spans = {}
    for index, info in metadata.storage_data.items():
        if (offset := getattr(index, "offset", None)) is not None:
            transforms = getattr(info, "transform_descriptors", None)
            spans[index.fqn, tuple(offset)] = FileSpan(info.relative_path, info.offset, info.length, transforms)
    return spans


class Window(io.RawIOBase):
    """A part of a file, as a file of which `zipfile` reads the directory."""

    def __init__(self, files: MappedFiles, file: str, offset: int, length: int) -> None:
        self.file, self.offset, self.length = file, offset, length
        self._files, self._at = files, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position inside the part, and return it."""
        at = offset + (0, self._at, self.length)[whence]
        if at < 0:
            raise ValueError("before the beginning")
        self._at = at
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the part goes, and return the bytes."""
        count = max(0, min(len(buffer), self.length - self._at))
        data = self._files.read_bytes(self.file, self.offset + self._at, count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_piece(window: Window, sizes: tuple[int, ...], dtype: torch.dtype) -> Stored:
    """Return where the numbers of a piece lie.

    Args:
        window: the piece.
        sizes: the shape that the metadata says.
        dtype: the type that it says.

    Raises:
        Exception: one of `DAMAGE`; it is no such piece.
    """
    with zipfile.ZipFile(window) as archive:
        records = {member.filename.partition("/")[2]: member for member in archive.infolist()}
    start, stop = _record(window, records["data.pkl"])
    window.seek(start)
    description = _InertUnpickler(io.BytesIO(window.read(stop - start))).load()
    if isinstance(description.args[0], Inert):  # a parameter, of a tensor
        description = description.args[0]
    (_, _, key, _, count), offset, shape, stride = description.args[:4]
    start, stop = _record(window, records[f"data/{key}"])
    if stop - start not in (count * dtype.itemsize, count):  # an untyped storage counts bytes
        raise ValueError("of another type")
    # Torch itself checks the layout: that it is one, and that it is the shape that the metadata says.
    layout = torch.empty_strided(shape, stride, dtype=dtype, device="meta").view(sizes)
    if offset < 0 or offset * dtype.itemsize + layout.untyped_storage().nbytes() > stop - start:
        raise ValueError("larger than its data")
    return Stored(window.file, dtype, sizes, layout.stride(), window.offset + start + offset * dtype.itemsize)


def _record(window: Window, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Return first byte and last byte + 1 of a record, behind its own header: 30 bytes and two texts."""
    window.seek(member.header_offset + 26)
    start = member.header_offset + 30 + sum(int.from_bytes(window.read(2), "little") for _ in range(2))
    stop = start + member.file_size
    if member.compress_type != zipfile.ZIP_STORED or not 0 <= start <= stop <= window.length:
        raise zipfile.BadZipFile("not as torch writes it")
    return start, stop
