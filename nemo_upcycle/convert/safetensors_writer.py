"""Stream a model's tensors into safetensors files. The finished files of an earlier, stopped run are kept."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.convert.whole import Whole, copy_others
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.stacked import is_stacked, shape_in_file, tensor_of
from nemo_upcycle.models.wrapper import INDEX
from nemo_upcycle.sources.base import OtherTensor
from nemo_upcycle.utils.dtypes import dtype_name
from nemo_upcycle.utils.files import clear_unfinished, require_disk, write_json
from nemo_upcycle.utils.progress import ProgressLine
from nemo_upcycle.utils.streams import StreamedFile


MAX_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_UNFINISHED = ".unfinished"

Shapes = dict[str, tuple[int, ...]]
#: Function that writes the data of a file's tensors in their order, and reports how many tensors it has just written.
WriteTensors = Callable[[StreamedFile, list[str], Callable[[int], None]], None]


class _Stopped(Exception):
    """Raised to stop a writer because another file could not be written."""


def require_dtype(dtype: torch.dtype) -> None:
    """Check that weights of this type can be written.

    Raises:
        UpcycleError: the type is not supported.
    """
    if dtype not in _DTYPE_NAMES:
        names = [dtype_name(one) for one in _DTYPE_NAMES]
        raise UpcycleError(
            "type of the weights on disk",
            got=dtype_name(dtype),
            expected=" or ".join(names),
            fix=f"add --dtype {names[0]}",
        )


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return the header of a safetensors file that holds tensors one after the other.

    Args:
        tensors: name, type (as the format calls it), shape and size (bytes) of each tensor.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size_bytes in tensors:
        entries[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires data to start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes as a file stores them."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class SafetensorsWriter:
    """The assignment of tensors to files, and the loop that writes the missing files.

    Args:
        shapes: name and shape of every tensor, in the model's order.
        dtype: type of all tensors on disk.
        max_shard_bytes: largest size of a file's data (bytes).
        order: function that returns a file's tensors in writing order; by default, the model's order.
        float32: names of the tensors that are float32 whatever `dtype` is; they come first in a file, so
            that they are aligned.
        whole: parts outside the text model; their tensors are in separate files, after all other files.

    Example:
        >>> writer = SafetensorsWriter(shapes, torch.bfloat16)  # doctest: +SKIP
        >>> writer.write(Path("model"), write_tensors, "export")  # doctest: +SKIP
    """

    shapes: Shapes
    dtype: torch.dtype
    max_shard_bytes: int = MAX_SHARD_BYTES
    order: Callable[[list[str]], list[str]] = list
    float32: frozenset[str] = frozenset()
    whole: Whole | None = None

    @cached_property
    def _others(self) -> dict[str, OtherTensor]:
        return {other.name: other for other in self.whole.others} if self.whole else {}

    def _called(self, name: str) -> str:
        return self.whole.called(name) if self.whole and name not in self._others else name

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """The tensors of every file. Files are named as transformers names them."""
        shards: list[list[str]] = [[]]
        size_bytes = 0
        tensors = [list(parts) for _, parts in itertools.groupby(self.shapes, tensor_of)]
        for names in (*tensors, *([name] for name in self._others)):
            tensor_bytes = self.size_bytes(names)
            is_full = size_bytes + tensor_bytes > self.max_shard_bytes
            if shards[-1] and (is_full or (shards[-1][0] in self._others) != (names[0] in self._others)):
                shards.append([])
                size_bytes = 0
            shards[-1] += names
            size_bytes += tensor_bytes
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, start=1)}

    def size_bytes(self, names: Iterable[str]) -> int:
        """Return the size of the data of these tensors (bytes)."""
        sizes = {True: 4, False: self.dtype.itemsize}
        return sum(
            other.size_bytes
            if (other := self._others.get(name))
            else torch.Size(self.shapes[name]).numel() * sizes[name in self.float32]
            for name in names
        )

    def _ordered(self, file: str) -> list[str]:
        """Return a file's tensors in writing order."""
        return sorted(self.order(self.files[file]), key=lambda name: name not in self.float32)

    def _header(self, file: str) -> bytes:
        if others := self._others_in(file):
            return safetensors_header((one.name, one.dtype, one.shape, one.size_bytes) for one in others)
        return safetensors_header(self._entries(file))

    def _entries(self, file: str) -> Iterator[tuple[str, str, Sequence[int], int]]:
        for tensor, parts in itertools.groupby(self._ordered(file), tensor_of):
            first, *others = parts
            shape = [1 + len(others)] * is_stacked(first) + list(shape_in_file(first, self.shapes[first]))
            dtype = torch.float32 if first in self.float32 else self.dtype
            yield self._called(tensor), _DTYPE_NAMES[dtype], shape, torch.Size(shape).numel() * dtype.itemsize

    def _others_in(self, file: str) -> list[OtherTensor]:
        """Return the file's tensors from outside the text model: either all tensors of the file, or none."""
        return [self._others[name] for name in self.files[file] if name in self._others]

    @cached_property
    def total_bytes(self) -> int:
        """Size of the data of all tensors (bytes)."""
        return self.size_bytes([*self.shapes, *self._others])

    @cached_property
    def tensors(self) -> int:
        """Number of tensors in the files."""
        return len({tensor_of(name) for name in (*self.shapes, *self._others)})

    def is_whole(self, folder: Path, file: str) -> bool:
        """Return whether a file is complete, judged by its size and header."""
        path = folder / file
        if not path.is_file():
            return False
        header = self._header(file)
        if path.stat().st_size != len(header) + self.size_bytes(self.files[file]):
            return False
        with path.open("rb") as handle:
            return handle.read(len(header)) == header

    def write(
        self, folder: Path, write_tensors: WriteTensors, label: str, *, writers: int = 1, progress: bool = True
    ) -> tuple[int, int]:
        """Write every file that is not complete yet, and the index if there are several files.

        A file gets its final name only when it is complete and on disk.

        Args:
            folder: existing folder.
            write_tensors: function that writes the data of one file; with several writers, it runs in several threads
                at once.
            label: name of the work in the progress line and in the error about a full disk.
            writers: number of files to write in parallel.
            progress: whether to show progress on stderr.

        Returns:
            The number of files that were kept, and the size of the data that was written (bytes).

        Raises:
            UpcycleError: the disk has too little space.
        """
        clear_unfinished(folder, f"*{_UNFINISHED}")  # before the free space is checked
        todo = [file for file in self.files if not self.is_whole(folder, file)]
        todo_bytes = sum(self.size_bytes(self.files[file]) for file in todo)
        kept = len(self.files) - len(todo)
        require_disk(folder, todo_bytes, f"the rest of {label}" if kept else label)
        count = len(self.shapes) + len(self._others)
        with ProgressLine(label, count, enabled=progress) as line:
            line.advance(count - sum(len(self.files[file]) for file in todo))
            self._write_files(folder, todo, write_tensors, writers, line)
        if len(self.files) > 1:
            weight_map = {self._called(tensor_of(name)): file for file, names in self.files.items() for name in names}
            write_json(folder / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})
        return kept, todo_bytes

    def _write_files(
        self, folder: Path, todo: list[str], write_tensors: WriteTensors, writers: int, line: ProgressLine
    ) -> None:
        """Write several files in parallel. The first failure stops all writers, and no half-written file stays."""
        stopped, counting = threading.Event(), threading.Lock()

        def advance(tensors: int) -> None:
            if stopped.is_set():
                raise _Stopped
            with counting:
                line.advance(tensors)

        def write(file: str) -> None:
            unfinished = folder / f"{file}{_UNFINISHED}"
            try:
                with StreamedFile(unfinished) as out:
                    out.write(self._header(file))
                    if others := self._others_in(file):
                        copy_others(out, others, advance)
                    else:
                        write_tensors(out, self._ordered(file), advance)
                unfinished.rename(folder / file)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise

        with ThreadPoolExecutor(writers, "write") as pool:
            try:
                for job in as_completed([pool.submit(write, file) for file in todo]):
                    job.result()
            except BaseException:  # also after an interrupt
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
