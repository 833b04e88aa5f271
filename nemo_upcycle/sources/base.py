"""What a checkpoint looks like to the rest of the package: named tensors of which one may read a slice."""

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
    """A tensor that stands beside the text model in its files, as in a vision-language checkpoint.

    Args:
        name: its name there.
        part: the part that it belongs to, such as `vision_tower`.
        dtype: its type, by the format's name.
        shape: its shape.
        path: the file.
        start_byte: place of its first byte in it.
        size_bytes: how many.
    """

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start_byte: int
    size_bytes: int


class DenseSource(Protocol):
    """A dense checkpoint, open for reading slices. What has a body here is that of a source of one dense model."""

    path: Path
    architecture: Architecture

    @property
    def bytes_read(self) -> int:
        """Bytes of all slices read so far; headers do not count."""

    def names(self) -> Iterable[str]:
        """Return the names of its tensors, in Hugging Face's spelling."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Return a slice, given as (start, stop) along every axis, and read nothing but that slice."""

    def prefetch(self, name: str, index: Index | None = None) -> None:
        """Begin to fetch a slice that will be read soon, where that helps; it is not counted as read."""

    def byte_range(self, name: str, index: Index | None = None) -> ByteRange | None:
        """Return where a slice's bytes lie, if that is in one file, one after the other, as `read` gives them."""
        return None

    def release(self) -> None:
        """Give back memory that earlier reads still take up."""

    def fingerprint(self) -> dict[str, str]:
        """Identify the files without reading them whole."""

    def others(self) -> Sequence[OtherTensor]:
        """List the tensors in the files that are no part of the text model; usually none."""
        return ()

    def branches(self) -> Sequence[DenseSource]:
        """Return the sources whose networks become experts, copy by copy in turn: one, unless several are mixed."""
        return (self,)

    def inexact_because(self) -> tuple[str, ...]:
        """Return why an upcycled model cannot compute what this source's dense model computes; usually empty."""
        return ()

    def __enter__(self) -> DenseSource: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def left_out(others: Iterable[OtherTensor]) -> dict[str, dict[str, int]]:
    """Count what an upcycled text model leaves out of its parent's files.

    Args:
        others: the tensors beside the text model.

    Returns:
        Part -> its `tensors` and `bytes`; empty where there is but the text model.
    """
    parts: dict[str, dict[str, int]] = {}
    for other in others:
        count = parts.setdefault(other.part, {"tensors": 0, "bytes": 0})
        count["tensors"] += 1
        count["bytes"] += other.size_bytes
    return parts


def left_out_text(parts: Mapping[str, Mapping[str, int]]) -> str:
    """Say what is left out.

    Example:
        >>> left_out_text({"vision_tower": {"tensors": 436, "bytes": 833648640}})
        'vision_tower (436 tensors, 795.0 MiB)'
    """
    return ", ".join(f"{part} ({of['tensors']} tensors, {size_text(of['bytes'])})" for part, of in parts.items())
