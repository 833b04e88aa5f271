"""The tensors of an upcycled Hugging Face model, made from dense slices and written straight into their files.

A dense slice is read, cast and checked once, in blocks of bounded size, and every block is written to all experts that
are copies of it: memory does not grow with the model, and nothing is computed twice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from nemo_upcycle.architecture import Architecture
from nemo_upcycle.connector import require_finite
from nemo_upcycle.errors import CheckpointError, problem
from nemo_upcycle.export import hf_shapes
from nemo_upcycle.hf_folder import safetensors_header
from nemo_upcycle.init.experts import ExpertMatrix, change, output_factor
from nemo_upcycle.init.router import router_weight
from nemo_upcycle.mapping import Cut, hf_constants, row_of, row_of_hf
from nemo_upcycle.progress import ProgressLine
from nemo_upcycle.slices import Shard, pieces, shard_shape
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.spec import UpcycleSpec


#: What is read, cast and written at once.
BLOCK_BYTES = 32 << 20


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
        return hf_shapes(self.made)

    @cached_property
    def _constants(self) -> dict[str, tuple[int, ...]]:
        return hf_constants(self.made)

    def size_bytes(self, names: list[str]) -> int:
        """Return the bytes of the data of these tensors."""
        return sum(torch.Size(self.shapes[name]).numel() for name in names) * self.dtype.itemsize

    def header(self, names: list[str]) -> bytes:
        """Return what stands before the data of a file with these tensors."""
        return safetensors_header(names, self.shapes, self.dtype)

    def write_file(self, path: Path, names: list[str], line: ProgressLine) -> None:
        """Write one file, in whatever order the dense slices come, and see that it is on the disk.

        Raises:
            CheckpointError: a slice holds NaN, infinity or a number too large for the type.
        """
        header = self.header(names)
        place = len(header)
        copies: dict[Origin, list[tuple[str, int]]] = {}
        with path.open("wb", buffering=0) as handle:
            file = handle.fileno()
            handle.truncate(place + self.size_bytes(names))
            _put(file, header, 0)
            for name in names:
                if origin := self._origin(name):
                    copies.setdefault(origin, []).append((name, place))
                else:
                    _put(file, _bytes(self._small(name)), place)
                    line.advance()
                place += self.size_bytes([name])
            for origin, places in copies.items():
                self._write_copies(file, origin, places)
                line.advance(len(places))
            os.fsync(file)

    def _origin(self, name: str) -> Origin | None:
        """Return what a tensor is made of; None for a router and for constants."""
        if name in self._constants:
            return None
        row, part, layer, expert = row_of_hf(name, self.made)
        if row.role == "router":
            return None
        arch, (copy, shard) = self.dense.architecture, divmod(expert, self.spec.granularity)
        source = row_of(row.dense_role, arch)
        first_neuron = shard * (self.made.expert_ffn_size or 0)
        found = pieces(source, arch, Shard(), shard_shape(row, self.made, Shard()), first_neuron)
        bounds = next(piece.source for piece in found if piece.part == part)
        branch = copy % len(self.dense.branches()) if row.is_expert else None
        factor = output_factor(self.spec, row.role, expert)
        return Origin(branch, source.hf[part].format(layer=layer), bounds, row.role, factor)

    def _small(self, name: str) -> torch.Tensor:
        if name in self._constants:
            return torch.zeros(self.shapes[name], dtype=self.dtype)
        _, _, layer, _ = row_of_hf(name, self.made)
        return router_weight(self.spec, layer, self.made.hidden_size).to(self.dtype)

    def _write_copies(self, file: int, origin: Origin, places: list[tuple[str, int]]) -> None:
        """Write the tensors that are made of one dense slice; what the method changes is needed whole."""
        is_changed = origin.role.startswith("expert_") and self.spec.method != "copy"
        source = self.dense if origin.branch is None else self.dense.branches()[origin.branch]
        (first, last), *rest = origin.bounds
        row_bytes = torch.Size([stop - start for start, stop in rest]).numel() * self.dtype.itemsize
        rows = last - first if is_changed else max(1, BLOCK_BYTES // row_bytes)
        for start in range(first, last, rows):
            block = self._read(source, origin, ((start, min(start + rows, last)), *rest))
            for name, place in places:
                own = self._changed(name, block) if is_changed else block
                _put(file, _bytes(own), place + (start - first) * row_bytes)
            source.release()

    def _read(self, source: DenseSource, origin: Origin, bounds: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Return a slice as the output holds it: cast, then scaled in that type, as the connector does."""
        slice_ = source.read(origin.name, bounds)
        made = slice_.to(self.dtype)
        if origin.factor != 1.0:
            made = made * origin.factor
        if origin.role == "shared_fc2":  # Qwen2-MoE halves its shared expert, see `hf_constants`
            made = made * 2
        try:
            require_finite(made, origin.name, source)
        except CheckpointError:
            require_finite(slice_, origin.name, source)
            expected, fix = f"numbers that {self.dtype} can hold", "convert to bfloat16 or float32"
            raise CheckpointError(problem(origin.name, got="larger ones", expected=expected, fix=fix)) from None
        return made.contiguous()

    def _changed(self, name: str, copied: torch.Tensor) -> torch.Tensor:
        """Return one expert's own version of a copy: with noise, or with neurons drawn anew."""
        row, number, layer, expert = row_of_hf(name, self.made)
        is_down = row.cut is Cut.NEURON_COLUMNS
        own = copied.clone()
        own_FD, copied_FD = (own.T, copied.T) if is_down else (own, copied)
        part = "down" if is_down else ("gate", "up")[number]
        change(self.spec, ExpertMatrix(layer, expert, part, 0, own_FD, lambda: copied_FD))
        return own


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _put(file: int, data: bytes | memoryview, place: int) -> None:
    view = memoryview(data)
    while len(view):  # the kernel writes at most 2 GiB at once
        count = os.pwrite(file, view, place)
        view, place = view[count:], place + count
