"""Tensors in files: slices are views of the mapped file and are fetched by large reads in parallel.

A page fault on a map waits for one small read, which is slow on a network file system. So a few threads first read the
bytes that a slice spans, in blocks. This fills the page cache, where the map finds the bytes; the read buffers are
thrown away. All ranks of a machine share the page cache: if one rank has fetched a block, or is fetching it, no other
rank reads the block again, as long as the blocks fit in memory. Blocks that are already cached are not read at all, so
a warm local file costs one probe per block.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.base import Index
from nemo_upcycle.utils.streams import ByteRange


if TYPE_CHECKING:
    from typing_extensions import Self

Entry = TypeVar("Entry")
#: Size of one read (bytes), and number of parallel reads. The buffers need 16 MiB, but only if a file is not cached.
_BLOCK_BYTES = 4 << 20
_THREADS = 4
#: Flag for reading only from the page cache. Only Linux has this flag. On other systems, files are only mapped, and
#: there are no large reads.
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)


@dataclass(frozen=True)
class Stored:
    """The place of a tensor in a file.

    Args:
        file: file name inside the folder.
        dtype: type of the tensor.
        shape: shape of the tensor.
        stride: strides, in elements.
        start_byte: position of its first element in the file.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start_byte: int


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor without gaps."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])


def bounds_of(folder: Path, name: str, shape: tuple[int, ...], index: Index | None) -> list[tuple[int, int]]:
    """Return the checked bounds of a slice along every axis; the whole tensor if `index` is None.

    Raises:
        CheckpointError: the slice reaches beyond the tensor, or has another number of axes.
    """
    bounds = [(0, size) for size in shape] if index is None else [(start, stop) for start, stop in index]
    if len(bounds) != len(shape) or not all(0 <= a <= b <= size for (a, b), size in zip(bounds, shape, strict=True)):
        raise CheckpointError(f"{folder}: slice {bounds} of {name} reaches beyond its shape {list(shape)}.")
    return bounds


class MappedFiles:
    """The files of a folder, opened and mapped on first use.

    Args:
        folder: the folder.

    Example:
        >>> files = MappedFiles(Path("dense"))  # doctest: +SKIP
        >>> stored = Stored("model.safetensors", torch.bfloat16, (8, 4), (4, 1), 1024)  # doctest: +SKIP
        >>> row_1D = files.read("model.norm.weight", stored, [(2, 3), (0, 4)])  # doctest: +SKIP
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.bytes_read = 0  # of all slices; headers do not count
        self._descriptors: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._fetched: dict[tuple[str, int, int], list[Future[None]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._buffers = threading.local()
        self._lock = threading.RLock()  # several threads may read
        weakref.finalize(self, _close, self._descriptors)

    def read(self, name: str, stored: Stored, index: Index | None = None) -> torch.Tensor:
        """Fetch a slice and return it as a view of the map. Never write to it.

        A tensor that does not start at a multiple of its element size is returned as a copy, because kernels are not
        safe on such a view.

        Raises:
            CheckpointError: the slice reaches beyond the tensor, or the file cannot be read.
        """
        bounds = bounds_of(self._folder, name, stored.shape, index)
        sizes = [stop - start for start, stop in bounds]
        if 0 in sizes:
            return torch.empty(sizes, dtype=stored.dtype)
        start, stop = _span(stored, bounds)
        for block in self._fetch(stored.file, start, stop):
            block.result()
        data, item = self._map(stored.file), stored.dtype.itemsize
        with self._lock:
            self._fetched[stored.file, start, stop] = []
            self.bytes_read += math.prod(sizes) * item
        if start % item == 0:
            flat = torch.frombuffer(data, dtype=stored.dtype, count=(stop - start) // item, offset=start)
            return flat.as_strided(sizes, stored.stride)
        flat = torch.frombuffer(data, dtype=torch.uint8, count=stop - start, offset=start)
        items = flat.as_strided([*sizes, item], [*(stride * item for stride in stored.stride), 1])
        return items.clone(memory_format=torch.contiguous_format).view(stored.dtype).squeeze(-1)

    def prefetch(self, name: str, stored: Stored, index: Index | None = None) -> None:
        """Start to fetch a slice that will be read soon. Returns at once."""
        bounds = bounds_of(self._folder, name, stored.shape, index)
        if all(start < stop for start, stop in bounds):
            self._fetch(stored.file, *_span(stored, bounds))

    def part(self, name: str, stored: Stored, index: Index | None = None) -> ByteRange | None:
        """Return where the bytes of a slice are, if they are contiguous and in the order of its elements."""
        bounds = bounds_of(self._folder, name, stored.shape, index)
        sizes = tuple(stop - start for start, stop in bounds)
        wanted = row_major(sizes)
        if 0 in sizes or any(size > 1 and a != b for size, a, b in zip(sizes, stored.stride, wanted, strict=True)):
            return None
        start, stop = _span(stored, bounds)
        return ByteRange(self._folder / stored.file, self._descriptor(stored.file), start, stop - start)

    def read_bytes(self, file: str, start: int, count: int) -> bytes:
        """Return a few bytes of a file, for its headers. At the end of the file, fewer bytes come back."""
        return os.pread(self._descriptor(file), count, start)

    def release(self) -> None:
        """Take the pages out of this process's memory. They stay in the page cache, and views stay valid."""
        for mapped in list(self._maps.values()):
            mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the files. Views that are still alive keep their map, and the last view closes it."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._maps.clear()
        self._fetched.clear()
        _close(self._descriptors)

    def _fetch(self, file: str, start: int, stop: int) -> list[Future[None]]:
        """Start to read the blocks of a span that are not in the page cache, and return all pending reads."""
        key = (file, start, stop)
        with self._lock:
            if key not in self._fetched:
                first, last = start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES)
                edges = [start, *(block * _BLOCK_BYTES for block in range(first + 1, last)), stop]
                blocks = [(a, b) for a, b in itertools.pairwise(edges) if not self._is_cached(file, b - 1)]
                self._fetched[key] = [self._submit(file, a, b) for a, b in blocks]
            return self._fetched[key]

    def _is_cached(self, file: str, byte: int) -> bool:
        if _NOWAIT is None:
            return True
        try:
            return os.preadv(self._descriptor(file), [bytearray(1)], byte, _NOWAIT) == 1
        except OSError:  # not cached, or the file system cannot tell
            return False

    def _submit(self, file: str, start: int, stop: int) -> Future[None]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read")
        return self._pool.submit(self._read_block, file, self._descriptor(file), start, stop)

    def _read_block(self, file: str, descriptor: int, start: int, stop: int) -> None:
        if not hasattr(self._buffers, "block"):
            self._buffers.block = memoryview(bytearray(_BLOCK_BYTES))
        while start < stop:
            try:
                count = os.preadv(descriptor, [self._buffers.block[: stop - start]], start)
                got = "the file ends before"
            except OSError as error:
                count, got = 0, str(error)
            if not count:
                raise CheckpointError(
                    str(self._folder / file),
                    kind="state",
                    got=f"cannot be read from byte {start} to {stop}: {got}",
                    fix="check the file system, and make sure that no other process writes to the checkpoint",
                )
            start += count

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self._folder / file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                if hasattr(os, "posix_fadvise"):
                    # Our reads already have the right size, so the kernel must not read ahead beyond the slice.
                    os.posix_fadvise(self._descriptors[file], 0, 0, os.POSIX_FADV_RANDOM)
            return self._descriptors[file]

    def _map(self, file: str) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                # torch.frombuffer needs a writable map. A private map is writable, and no write reaches the file.
                self._maps[file] = mmap.mmap(self._descriptor(file), 0, access=mmap.ACCESS_COPY)
            return self._maps[file]


class TensorFiles(Generic[Entry]):
    """Named tensors in mapped files: the common part of all checkpoint formats.

    Each format sets the path, the files, and its own entry for each tensor.
    """

    path: Path
    files: MappedFiles
    _tensors: dict[str, Entry]

    @property
    def bytes_read(self) -> int:
        """Bytes of all slices read so far. Headers do not count."""
        return self.files.bytes_read

    def names(self) -> Iterable[str]:
        """Return the names of the tensors."""
        return self._tensors.keys()

    def _entry(self, name: str) -> Entry:
        if name not in self._tensors and (bare := name.removeprefix("model.")) in self._tensors:
            raise CheckpointError(
                str(self.path),
                kind="state",
                got=f"has {bare} instead of {name}: the model was saved without its head",
                fix="load the folder with AutoModelForCausalLM, and save the model again",
            )
        if name not in self._tensors:
            raise CheckpointError.unknown(f"{self.path}: tensor", name, self._tensors)
        return self._tensors[name]

    def release(self) -> None:
        """Free the memory that the mapped files use in this process. Later reads bring the pages back."""
        self.files.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


def _span(stored: Stored, bounds: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the first byte and the last byte + 1 of a non-empty slice in the file."""
    first = sum(start * stride for (start, _), stride in zip(bounds, stored.stride, strict=True))
    last = sum((stop - 1) * stride for (_, stop), stride in zip(bounds, stored.stride, strict=True))
    return stored.start_byte + first * stored.dtype.itemsize, stored.start_byte + (last + 1) * stored.dtype.itemsize


def _close(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
