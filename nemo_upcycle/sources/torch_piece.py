"""One tensor as `torch.save` writes it, somewhere in a file: where its numbers are, so that they can be read by slice.

It is an uncompressed zip archive of a small pickle, which describes the tensor, and of the numbers as they are. The
pickle may name nothing but what it takes to describe a tensor, and gets none of it: what it names is inert.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import torch

from nemo_upcycle.sources.inert_pickle import Inert
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
_MAX_DESCRIPTION_BYTES = 1 << 16
DTYPE_NAMES = {dtype_name(dtype) for dtype in torch.storage._dtype_to_storage_type_map()}


class _PieceUnpickler(pickle.Unpickler):
    """Reads how a saved tensor lies in its storage: number of the first element, shape and strides."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"):
            return Inert
        if module == "collections" and name == "OrderedDict":
            return dict
        if module == "torch" and (name.endswith("Storage") or name in DTYPE_NAMES):
            return str  # the type: the metadata says it too
        raise pickle.UnpicklingError(f"the class {module}.{name} is not allowed in a tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, files: MappedFiles, file: str, offset: int, length: int) -> None:
        self.file, self.offset, self.length = file, offset, length
        self._files, self._at = files, 0

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

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
    description = _PieceUnpickler(io.BytesIO(window.read(min(stop - start, _MAX_DESCRIPTION_BYTES)))).load()
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
