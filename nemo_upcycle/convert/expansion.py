"""The tensors of an upcycled Hugging Face model, made from dense slices and written straight into their files.

A dense slice is read, cast and checked once and written to all experts that are copies of it. In a file they lie side
by side, so that it is written from front to end. Memory does not grow with the model: slices go through in blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from nemo_upcycle.convert.export import require_class
from nemo_upcycle.convert.hf_folder import safetensors_header
from nemo_upcycle.init.experts import ExpertMatrix, change, output_factor
from nemo_upcycle.init.router import router_weight
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.mapping import Sharding, hf_constants, mapping_of, mapping_of_hf
from nemo_upcycle.models.sharding import Shard, hf_shapes, shard_shape, source_slices
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.checks import require_finite
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.streams import ByteRange, StreamedFile


#: What is read, cast and written at once; and up to which size a slice is kept for the next copy, not made again.
BLOCK_BYTES = 32 << 20
KEPT_BYTES = 256 << 20
#: Files written at a time: writing is the kernel's work, done on one core for each.
WRITERS = 4


def dense_slice(
    hf_name: str, dense: Architecture, made: Architecture
) -> tuple[str, tuple[tuple[int, int], ...]] | None:
    """Return name and bounds of the dense slice that a tensor of an upcycled model is made of; None for a router.

    Args:
        hf_name: the tensor's.
        dense: the parent's architecture.
        made: the upcycled model's.
    """
    row, part, layer, expert = mapping_of_hf(hf_name, made)
    if row.role == "router":
        return None
    source, width = mapping_of(row.dense_role, dense), made.expert_ffn_size or dense.ffn_size
    first_neuron = expert % (dense.ffn_size // width) * width
    found = source_slices(source, dense, Shard(), shard_shape(row, made, Shard()), first_neuron)
    bounds = next(piece.source for piece in found if piece.part == part)
    return source.hf[part].format(layer=layer), bounds


@dataclass(frozen=True)
class Origin:
    """The dense slice that a tensor of the output is made of, the output's role in the mapping table, the factor."""

    branch: int | None
    name: str
    bounds: tuple[tuple[int, int], ...]
    role: str
    factor: float


@dataclass(frozen=True)
class Expansion:
    """What a spec makes of a dense checkpoint, tensor by tensor, with the bits of `upcycle_into` in that type.

    Args:
        dense: the open dense checkpoint.
        spec: what to make of it.
        dtype: type of the result, in which it is scaled and changed, too.

    Raises:
        SpecError: the spec does not fit, or no Hugging Face class can hold the model.
    """

    dense: DenseSource
    spec: UpcycleSpec
    dtype: torch.dtype

    @cached_property
    def made(self) -> Architecture:
        """The upcycled model's architecture."""
        return self.dense.architecture.upcycled(self.spec)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order in which they are written."""
        require_class(self.made)
        return hf_shapes(self.made)

    @cached_property
    def _constants(self) -> dict[str, tuple[int, ...]]:
        return hf_constants(self.made)

    def size_bytes(self, names: list[str]) -> int:
        """Return the bytes of the data of these tensors."""
        return sum(torch.Size(self.shapes[name]).numel() for name in names) * self.dtype.itemsize

    def file_order(self, names: list[str]) -> dict[Origin | str, list[str]]:
        """Return the tensors of a file in the order in which they lie in it, by what they are made of."""
        found: dict[Origin | str, list[str]] = {}
        for name in names:
            found.setdefault(self._origin(name) or name, []).append(name)
        return found

    def header(self, names: list[str]) -> bytes:
        """Return what stands before the data of a file with these tensors."""
        ordered = [name for copies in self.file_order(names).values() for name in copies]
        return safetensors_header(ordered, self.shapes, self.dtype)

    def is_whole(self, path: Path, names: list[str]) -> bool:
        """Return whether a file with these tensors is there, as far as its size and header tell."""
        if not path.is_file():
            return False
        header = self.header(names)
        if path.stat().st_size != len(header) + self.size_bytes(names):
            return False
        with path.open("rb") as handle:
            return handle.read(len(header)) == header

    @property
    def writers(self) -> int:
        """Files to write at a time. Methods that compute use all cores for one, and hold whole matrices in memory."""
        return 1 if self.spec.method != "copy" else min(WRITERS, os.cpu_count() or 1)

    def write_file(self, path: Path, names: list[str], advance: Callable[[int], None]) -> None:
        """Write one file and see that it is on the disk; several threads may do so, each another file.

        Args:
            path: the file.
            names: its tensors.
            advance: is told how many tensors more are written.

        Raises:
            CheckpointError: a slice holds NaN, infinity or a number too large for the type.
        """
        with StreamedFile(path) as file:
            file.write(self.header(names))
            for origin, copies in self.file_order(names).items():
                if isinstance(origin, Origin):
                    self._write_copies(file, origin, copies)
                else:
                    file.write(_bytes(self._small(origin)))
                advance(len(copies))

    def _origin(self, name: str) -> Origin | None:
        """Return what a tensor is made of; None for a router and for constants."""
        if name in self._constants or (found := dense_slice(name, self.dense.architecture, self.made)) is None:
            return None
        row, _, _, expert = mapping_of_hf(name, self.made)
        branch = expert // self.spec.granularity % len(self.dense.branches()) if row.is_expert else None
        return Origin(branch, *found, row.role, output_factor(self.spec, row.role, expert))

    def _small(self, name: str) -> torch.Tensor:
        if name in self._constants:
            return torch.zeros(self.shapes[name], dtype=self.dtype)
        _, _, layer, _ = mapping_of_hf(name, self.made)
        router = router_weight(self.spec, layer, self.made.hidden_size)
        made = router.to(self.dtype)
        require_finite(router, name, made=made)
        return made

    def _write_copies(self, file: StreamedFile, origin: Origin, names: list[str]) -> None:
        """Write the tensors that are made of one dense slice."""
        source = self.dense if origin.branch is None else self.dense.branches()[origin.branch]
        if part := self._unchanged(source, origin):
            for _ in self._blocks(source, origin, whole=False):
                pass  # it was checked
            for _ in names:
                file.copy(part)
            return
        is_changed = self._is_changed(origin)
        is_kept = is_changed or self.size_bytes(names[:1]) <= KEPT_BYTES
        blocks = list(self._blocks(source, origin, whole=is_changed)) if is_kept else None
        for name in names:
            for block in blocks or self._blocks(source, origin, whole=False):
                file.write(_bytes(self._changed(name, block) if is_changed else block))

    def _is_changed(self, origin: Origin) -> bool:
        return origin.role.startswith("expert_") and self.spec.method != "copy"

    def _unchanged(self, source: DenseSource, origin: Origin) -> ByteRange | None:
        """Return where in a file the bytes of the output stand already; None if they stand nowhere."""
        made_anew = self._is_changed(origin) or origin.factor != 1.0 or origin.role == "shared_fc2"
        if made_anew or source.dtype(origin.name) is not self.dtype:
            return None
        return source.byte_range(origin.name, origin.bounds)

    def _blocks(self, source: DenseSource, origin: Origin, *, whole: bool) -> Iterator[torch.Tensor]:
        """Yield what a slice becomes, block by block of its rows; all at once for a method that needs all of it."""
        (first, last), *rest = origin.bounds
        row_bytes = torch.Size([stop - start for start, stop in rest]).numel() * self.dtype.itemsize
        rows = last - first if whole else max(1, BLOCK_BYTES // row_bytes)
        for start in range(first, last, rows):
            yield self._read(source, origin, ((start, min(start + rows, last)), *rest))
            source.release()  # pages of the mapped file; what is still needed of them comes back from the page cache

    def _read(self, source: DenseSource, origin: Origin, bounds: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Return a slice as the output holds it: cast, then scaled in that type, as the connector does."""
        slice_ = source.read(origin.name, bounds)
        made = slice_.to(self.dtype)
        if origin.factor != 1.0:
            made = made * origin.factor
        if origin.role == "shared_fc2":  # Qwen2-MoE halves its shared expert, see `hf_constants`
            made = made * 2
        require_finite(slice_, origin.name, source, made=made)
        return made.contiguous()

    def _changed(self, name: str, copied: torch.Tensor) -> torch.Tensor:
        """Return one expert's own version of a copy: with noise, or with neurons drawn anew."""
        row, number, layer, expert = mapping_of_hf(name, self.made)
        is_down = row.sharding is Sharding.NEURON_COLUMNS
        own = copied.clone()
        own_FD, copied_FD = (own.T, copied.T) if is_down else (own, copied)
        part = "down" if is_down else ("gate", "up")[number]
        change(self.spec, ExpertMatrix(layer, expert, part, 0, own_FD, lambda: copied_FD))
        require_finite(copied, name, made=own)
        return own


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
