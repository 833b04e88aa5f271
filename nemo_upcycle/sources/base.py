"""The interface of a checkpoint for the rest of the package: named tensors that can be read by slice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.utils.files import size_text
from nemo_upcycle.utils.streams import ByteRange


Index = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class OtherTensor:
    """A tensor outside the text model but in the same files, as in a vision-language checkpoint.

    Args:
        name: name in the files.
        part: part of the model, such as `vision_tower`.
        dtype: type, as the file format names it.
        shape: shape of the tensor.
        path: file that holds the tensor.
        start_byte: position of its first byte in the file.
        size_bytes: size of the tensor.
    """

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start_byte: int
    size_bytes: int


class DenseSource(Protocol):
    """A dense checkpoint, open for reading slices.

    Methods that have a body here are the defaults for a source of one dense model.
    """

    path: Path
    architecture: Architecture

    @property
    def bytes_read(self) -> int:
        """Bytes of all slices read so far. Headers do not count."""

    def names(self) -> Iterable[str]:
        """Return the names of the tensors, as Hugging Face spells them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Read a slice, given as (start, stop) along every axis, and read nothing else."""

    def prefetch(self, name: str, index: Index | None = None) -> None:
        """Start to fetch a slice that will be read soon, if early fetching helps. The slice does not count as read."""

    def byte_range(self, name: str, index: Index | None = None) -> ByteRange | None:
        """Return where the bytes of a slice are, if they lie in one file, contiguous and in the order of `read`."""
        return None

    def release(self) -> None:
        """Free the memory that earlier reads still use."""

    def fingerprint(self) -> dict[str, str]:
        """Identify the files without reading them completely."""

    def others(self) -> Sequence[OtherTensor]:
        """Return the tensors in the files that do not belong to the text model; usually none."""
        return ()

    def branches(self) -> Sequence[DenseSource]:
        """Return the sources whose networks become experts in turn: this source, or several if models are mixed."""
        return (self,)

    def inexact_because(self) -> tuple[str, ...]:
        """Return why an upcycled model cannot compute the function of this source's dense model; usually empty."""
        return ()

    def __enter__(self) -> DenseSource: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def left_out(others: Iterable[OtherTensor]) -> dict[str, dict[str, int]]:
    """Count the tensors and bytes of a parent's files that an upcycled text model leaves out.

    Args:
        others: tensors outside the text model.

    Returns:
        Part -> its `tensors` and `bytes`; empty if the files hold only the text model.
    """
    parts: dict[str, dict[str, int]] = {}
    for other in others:
        count = parts.setdefault(other.part, {"tensors": 0, "bytes": 0})
        count["tensors"] += 1
        count["bytes"] += other.size_bytes
    return parts


def left_out_text(parts: Mapping[str, Mapping[str, int]]) -> str:
    """Describe the parts that are left out.

    Example:
        >>> left_out_text({"vision_tower": {"tensors": 436, "bytes": 833648640}})
        'vision_tower (436 tensors, 795.0 MiB)'
    """
    return ", ".join(f"{part} ({of['tensors']} tensors, {size_text(of['bytes'])})" for part, of in parts.items())
