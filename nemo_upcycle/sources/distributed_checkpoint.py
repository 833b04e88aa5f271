"""A Megatron distributed checkpoint (torch_dist), read by slice, without Megatron and without building a model.

Such a folder holds `.metadata`, a pickle that says where each piece of each tensor lies, and `*.distcp` files that the
ranks wrote. `torch_pickles.py` reads both kinds of files without unpickling them in the usual way. The pieces are read
by slice, like safetensors files, and no piece is ever loaded whole.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.mapping_table import BY_ROLE
from nemo_upcycle.sources.base import Index
from nemo_upcycle.sources.mapped_files import MappedFiles, Stored, TensorFiles, bounds_of
from nemo_upcycle.sources.torch_pickles import DAMAGE, Window, open_piece, read_metadata


Bounds = list[tuple[int, int]]


class DistributedCheckpoint(TensorFiles[Any]):
    """The named tensors of a torch_dist checkpoint. Any slice can be read.

    Args:
        folder: folder with `.metadata` (for a NeMo checkpoint, its `weights`).

    Raises:
        CheckpointError: the checkpoint is missing or unfinished, or names files that are missing or too short.

    Example:
        >>> checkpoint = DistributedCheckpoint(Path("last/weights"))  # doctest: +SKIP
        >>> router_1ED = checkpoint.read("decoder.layers.mlp.router.weight", [(0, 1), (0, 8), (0, 576)])
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._tensors, self._spans, self._digest = read_metadata(folder)
        self._chunks = {name: sorted(entry.chunks, key=_first_row) for name, entry in self._tensors.items()}
        self.files = MappedFiles(folder)
        self._pieces: dict[tuple[str, tuple[int, ...]], Stored] = {}
        self._sizes_bytes = {file: self._size_bytes(file) for file in {span.file for span in self._spans.values()}}
        for (name, _), span in self._spans.items():
            if span.offset + span.length > self._sizes_bytes[span.file]:
                raise self._damaged(span.file, name, "the file ends before it")

    def _size_bytes(self, file: str) -> int:
        path = self.path / file
        if path.parent != self.path or not path.is_file():
            raise CheckpointError(
                f"Checkpoint {self.path}",
                kind="missing",
                got=f"has no {file}",
                fix="copy the checkpoint again, with all its files",
            )
        return path.stat().st_size

    def _damaged(self, file: str, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            str(self.path / file), kind="state", got=f"is damaged at {name} ({why})", fix="copy the checkpoint again"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor, over all ranks that wrote it."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""
        dtype: torch.dtype = self._entry(name).properties.dtype
        return dtype

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Read a slice, given as (start, stop) along every axis.

        If one piece holds the slice, the result is a view; otherwise the slice is assembled from several pieces. Copy
        the result; never write to it. Only the slice is read. The first access to a piece also reads some hundred
        bytes.

        Raises:
            CheckpointError: there is no such tensor, a piece is damaged, or the pieces do not cover the slice.
        """
        bounds = bounds_of(self.path, name, self.shape(name), index)
        parts = list(self._parts(name, bounds))
        if len(parts) == 1 and parts[0][0] == bounds:
            result = self.files.read(name, *parts[0][1:])
        else:
            result = torch.empty([stop - start for start, stop in bounds], dtype=self.dtype(name))
            self._check_cover(name, result.numel(), [place for place, _, _ in parts])
            for part in parts:
                self.files.prefetch(name, *part[1:])
            for place, piece, inside in parts:
                here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(place, bounds, strict=True))
                result[here] = self.files.read(name, piece, inside)
        return result

    def prefetch(self, name: str, index: Index | None = None) -> None:
        """Start to fetch a slice that will be read soon."""
        for _, piece, inside in self._parts(name, bounds_of(self.path, name, self.shape(name), index)):
            self.files.prefetch(name, piece, inside)

    def fingerprint(self) -> dict[str, str]:
        """Return the size of every file, and the sha256 of the metadata."""
        sizes = {file: f"{size} bytes" for file, size in sorted(self._sizes_bytes.items())}
        return {".metadata": f"sha256 {self._digest}"} | sizes

    def _parts(self, name: str, bounds: Bounds) -> Iterator[tuple[Bounds, Stored, Bounds]]:
        """Yield the overlap of a slice with each piece, the piece, and the place of the overlap inside the piece."""
        chunks, (start, stop) = self._chunks[name], bounds[0] if bounds else (0, 1)
        tallest = max((chunk.sizes[0] if chunk.sizes else 1 for chunk in chunks), default=0)
        first, last = (bisect_left(chunks, row, key=_first_row) for row in (start - tallest + 1, stop))
        for chunk in chunks[first:last]:
            place = [
                (max(start, offset), min(stop, offset + size))
                for (start, stop), offset, size in zip(bounds, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(start < stop for start, stop in place):
                inside = [(a - offset, b - offset) for (a, b), offset in zip(place, chunk.offsets, strict=True)]
                yield place, self._piece(name, tuple(chunk.offsets), tuple(chunk.sizes)), inside

    def _check_cover(self, name: str, wanted: int, places: list[Bounds]) -> None:
        got = sum(math.prod(stop - start for start, stop in place) for place in places)
        twice = any(
            all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))
            for one, other in itertools.combinations(places, 2)
        )
        if got != wanted or twice:
            raise CheckpointError(
                f"{self.path}: {name}",
                kind="state",
                got="has pieces that overlap" if twice else f"has {got} elements instead of {wanted}",
                fix="save the checkpoint again",
            )

    def _piece(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Stored:
        if (name, offset) not in self._pieces:
            span = self._spans.get((name, offset))
            if span is None or span.transforms:
                why = "compressed, which is not supported" if span else "no place in the metadata"
                raise self._damaged(span.file if span else ".metadata", name, why)
            window = Window(self.files, span.file, span.offset, span.length)
            try:
                self._pieces[name, offset] = open_piece(window, sizes, self.dtype(name))
            except DAMAGE as error:
                raise self._damaged(span.file, name, type(error).__name__) from None
        return self._pieces[name, offset]


def _first_row(chunk: Any) -> int:
    return chunk.offsets[0] if chunk.offsets else 0


def model_prefix(checkpoint: DistributedCheckpoint) -> str:
    """Find the prefix of the model's tensor names: NeMo writes `module.`, Megatron writes none.

    Raises:
        CheckpointError: there is no embedding, so the checkpoint is not a language model.
    """
    ending = BY_ROLE["embedding"].stored[0]
    for name in checkpoint.names():
        if name.endswith(ending) and not name.startswith("optimizer."):
            return name.removesuffix(ending)
    raise CheckpointError(
        f"Checkpoint {checkpoint.path}",
        kind="state",
        got=f"has no {ending}, so it is not a language model",
        fix="give a GPT checkpoint",
    )
