"""A Hugging Face folder of safetensors files, read by slice through a memory map.

`read` returns a view of the mapped file: bytes come from the disk (or the page cache) when the view is copied into
its place, so a slice exists nowhere else and costs no memory of its own.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from nemo_upcycle.architecture import read_architecture
from nemo_upcycle.errors import CheckpointError, problem, unknown
from nemo_upcycle.files import read_json
from nemo_upcycle.sources.base import Index


#: The format's names of the types that weights come in.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class _Entry:
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start_byte: int
    stop_byte: int


def _broken(path: Path, got: str, expected: str) -> CheckpointError:
    return CheckpointError(problem(str(path), got=got, expected=expected, fix="download or copy the file again"))


def _read_header(path: Path) -> tuple[dict[str, dict], int, str]:
    """Return the header, the offset of the data and the header's sha256; checks the file's length."""
    size_bytes = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= header_bytes <= _MAX_HEADER_BYTES or 8 + header_bytes > size_bytes:
            raise _broken(path, f"{size_bytes} bytes without a safetensors header", "a safetensors file")
        raw = handle.read(header_bytes)
    try:
        header = json.loads(raw)
        stop = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise _broken(path, "an unreadable safetensors header", "a safetensors file") from None
    if size_bytes != 8 + header_bytes + stop:
        raise _broken(
            path, f"{size_bytes} bytes", f"{8 + header_bytes + stop} bytes (the file is truncated or damaged)"
        )
    header.pop("__metadata__", None)
    return header, 8 + header_bytes, hashlib.sha256(raw).hexdigest()


def _files_of(folder: Path) -> list[str]:
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _broken(folder / _INDEX, "no weight_map", "an index with a weight_map")
        return sorted(set(weight_map.values()))
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    other = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth", ".gguf"))
    raise CheckpointError(
        problem(
            str(folder),
            got=f"no {_SINGLE} and no {_INDEX}" + (f", but {', '.join(other[:3])}" if other else ""),
            expected="weights as safetensors",
            fix="save the model with safe_serialization=True" if other else "check the path",
        )
    )


class SafetensorsFolder:
    """A dense checkpoint in Hugging Face's layout: `config.json` and one or many safetensors files.

    Opening it reads the headers only and checks every file's length against its header.

    Args:
        folder: the folder.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or the architecture is not known.

    Example:
        >>> with SafetensorsFolder(Path("runs/demo/dense")) as dense:  # doctest: +SKIP
        ...     gate_FD = dense.read("model.layers.0.mlp.gate_proj.weight")
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.architecture = read_architecture(folder)
        self.bytes_read = 0
        self._entries: dict[str, _Entry] = {}
        self._headers: dict[str, str] = {}
        self._maps: dict[str, mmap.mmap] = {}
        for file in _files_of(folder):
            self._add_file(file)

    def _add_file(self, file: str) -> None:
        path = self.path / file
        if path.parent != self.path or not path.is_file():
            raise CheckpointError(
                problem(
                    f"{self.path / _INDEX}",
                    got=f"the shard {file}, which does not exist",
                    expected="every shard that the index names",
                    fix="download the missing shard",
                )
            )
        header, data_byte, digest = _read_header(path)
        self._headers[file] = digest
        for name, entry in header.items():
            dtype = _DTYPES.get(entry["dtype"])
            start, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if dtype is None:
                raise _broken(path, f"{name} of type {entry['dtype']}", f"one of {', '.join(_DTYPES)}")
            if torch.Size(shape).numel() * dtype.itemsize != stop - start:
                raise _broken(path, f"{name} with {stop - start} bytes", f"the bytes of a {list(shape)} {dtype}")
            self._entries[name] = _Entry(file, dtype, shape, data_byte + start, data_byte + stop)

    def names(self) -> Iterable[str]:
        """Return the names of its tensors."""
        return self._entries.keys()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: {unknown('tensor', name, self._entries)}")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""
        return self._entry(name).dtype

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Return a slice as a view of the mapped file. Copy it; never write to it.

        Args:
            name: the tensor.
            index: (start, stop) along every axis; the whole tensor when None.

        Raises:
            CheckpointError: there is no such tensor, or the slice reaches beyond it.
        """
        entry = self._entry(name)
        whole = torch.frombuffer(
            self._map(entry.file), dtype=entry.dtype, count=torch.Size(entry.shape).numel(), offset=entry.start_byte
        ).view(entry.shape)
        for axis, (start, stop) in enumerate(index or ()):
            if not 0 <= start <= stop <= entry.shape[axis]:
                raise CheckpointError(f"{name}: slice {start}:{stop} of axis {axis} reaches beyond {entry.shape}")
            whole = whole.narrow(axis, start, stop - start)
        self.bytes_read += whole.numel() * entry.dtype.itemsize
        return whole

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self.path / file).open("rb") as handle:
                # A private map is writable, as torch.frombuffer wants it, and no write reaches the file.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def fingerprint(self) -> dict[str, str]:
        """Return, for every file, its size in bytes and the sha256 of its header."""
        return {
            file: f"{os.stat(self.path / file).st_size} bytes, header sha256 {digest}"
            for file, digest in self._headers.items()
        }

    def branches(self) -> tuple[SafetensorsFolder]:
        """Return this one source."""
        return (self,)

    def inexact_because(self) -> tuple[str, ...]:
        """Return nothing: it is the dense model itself."""
        return ()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Views that are still alive keep their map; dropping ours lets the last of them close it.
        self._maps.clear()
