"""What a checkpoint looks like to the rest of the package: named tensors of which one may read a slice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.utils.streams import ByteRange


Index = Sequence[tuple[int, int]]


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
