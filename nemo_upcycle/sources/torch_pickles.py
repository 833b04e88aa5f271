"""Read pickles of `torch.save` and torch_dist checkpoints without the classes and functions that the pickles name.

Each name in a pickle becomes an inert stand-in (`Inert`), except for a few types that nobody can change. So nothing
that a pickle builds, calls or changes belongs to torch, Python or this package.

`.metadata` of a torch_dist checkpoint says where each piece of each tensor lies. A piece is one tensor as `torch.save`
writes it, at some position in a file. The piece is an uncompressed zip archive that contains the raw numbers and a
small pickle, which describes the tensor.
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


#: Exceptions that opening a damaged or foreign piece can raise.
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
    """Stand-in for a class or function that a pickle names. It keeps its arguments and does nothing with them.

    A pickle can set attributes of every object that it imports, but not of this class. To set attributes, pickle calls
    `__setstate__`, and this call fails on a class without an instance. If a pickle builds a list or dict of another
    class, the items are ignored.
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
    """Stand-in for torch's metadata class and for Megatron's subclass of it."""

    state_dict_metadata: dict[str, Any]
    storage_data: dict[Any, Any]


class _Properties(Inert):
    """Stand-in for a tensor's properties. torch saves their values in order."""

    dtype: Any

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


#: Name in a pickle -> its stand-in; `Inert` for all other names. Python and torch do not let anyone change the types
#: and values in this table.
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
        return pid  # the place of a tensor's numbers


def read_saved(path: Path) -> Any:
    """Read the dicts, lists, numbers and texts of a `torch.save` file, without tensors and without running anything.

    Raises:
        OSError, ValueError: the file cannot be read, or was not written by `torch.save`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(one for one in archive.infolist() if one.filename.endswith("/data.pkl"))
            with archive.open(member) as handle:
                return _InertUnpickler(handle).load()
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"damaged ({type(error).__name__})") from None


@dataclass(frozen=True)
class FileSpan:
    """The bytes of a file that hold a piece of a tensor.

    `transforms` says how the bytes are compressed; None if the bytes are not compressed.
    """

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
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            str(path),
            kind="state",
            got=f"cannot be read as torch_dist metadata ({reason})",
            fix="copy the checkpoint again",
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
    """A part of a file as a file object, so that `zipfile` can read its directory."""

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
        """Fill a buffer with the bytes that the part still has, and return their number."""
        count = max(0, min(len(buffer), self.length - self._at))
        data = self._files.read_bytes(self.file, self.offset + self._at, count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_piece(window: Window, sizes: tuple[int, ...], dtype: torch.dtype) -> Stored:
    """Return the place of a piece's numbers.

    Args:
        window: the piece.
        sizes: shape from the metadata.
        dtype: type from the metadata.

    Raises:
        Exception: the window does not hold this piece. The exception is one of `DAMAGE`.
    """
    with zipfile.ZipFile(window) as archive:
        records = {member.filename.partition("/")[2]: member for member in archive.infolist()}
    start, stop = _record(window, records["data.pkl"])
    window.seek(start)
    description = _InertUnpickler(io.BytesIO(window.read(stop - start))).load()
    if isinstance(description.args[0], Inert):  # a parameter that wraps a tensor
        description = description.args[0]
    (_, _, key, _, count), offset, shape, stride = description.args[:4]
    start, stop = _record(window, records[f"data/{key}"])
    if stop - start not in (count * dtype.itemsize, count):  # an untyped storage gives its size in bytes
        raise ValueError("of another type")
    # Torch itself checks that the layout is valid and has the shape from the metadata.
    layout = torch.empty_strided(shape, stride, dtype=dtype, device="meta").view(sizes)
    if offset < 0 or offset * dtype.itemsize + layout.untyped_storage().nbytes() > stop - start:
        raise ValueError("larger than its data")
    return Stored(window.file, dtype, sizes, layout.stride(), window.offset + start + offset * dtype.itemsize)


def _record(window: Window, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Return the first byte and the last byte + 1 of a record, without its header (30 bytes and two texts)."""
    window.seek(member.header_offset + 26)
    start = member.header_offset + 30 + sum(int.from_bytes(window.read(2), "little") for _ in range(2))
    stop = start + member.file_size
    if member.compress_type != zipfile.ZIP_STORED or not 0 <= start <= stop <= window.length:
        raise zipfile.BadZipFile("not as torch writes it")
    return start, stop
