"""The tensors of an upcycled Hugging Face model, made from dense slices and written directly into their files.

A dense slice is read, cast and checked once, and written to all experts that are copies of the slice. These experts
are neighbours in the file, so the file is written from front to end. Slices are processed in blocks, so memory does
not grow with the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from nemo_upcycle.convert.safetensors_writer import as_bytes
from nemo_upcycle.convert.whole import Whole
from nemo_upcycle.init.methods import METHODS
from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.families import require_class
from nemo_upcycle.models.mapping import as_written, constant_tensors
from nemo_upcycle.models.sharding import float32_names, hf_shapes
from nemo_upcycle.models.stacked import as_in_file, is_stacked, is_transposed
from nemo_upcycle.online.tensor_plan import ModelPlan, TensorPlan, change_copies, expand_slice
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.checks import require_finite
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.streams import ByteRange, StreamedFile


#: Size of the blocks that are read, cast and written (bytes). A slice of at most this size is kept for the next copy.
#: A larger slice is read and computed again for each copy.
BLOCK_BYTES = 32 << 20
KEPT_BYTES = 256 << 20
#: Number of files to write in parallel. The kernel does the writing, on one core per file.
WRITERS = 4


@dataclass(frozen=True)
class Expansion:
    """The tensors that a spec makes from a dense checkpoint.

    The tensors have the same bits as the result of `upcycle_into` in the same type.

    Args:
        dense: open dense checkpoint.
        spec: how to upcycle it.
        dtype: type of the result. Weights are also scaled and changed in this type.
        whole: parts outside the text model, which are also written; None to write only the text model.

    Raises:
        SpecError: the spec does not fit, or no Hugging Face class can hold the model.
    """

    dense: DenseSource
    spec: UpcycleSpec
    dtype: torch.dtype
    whole: Whole | None = None

    @cached_property
    def plan(self) -> ModelPlan:
        """Plan of the upcycled model."""
        plan = ModelPlan.of(self.dense, self.spec)
        return replace(plan, moe_arch=self.whole.moe_arch) if self.whole else plan

    @property
    def moe_arch(self) -> Architecture:
        """Architecture of the upcycled model."""
        return self.plan.moe_arch

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the model's order."""
        require_class(self.moe_arch)
        return hf_shapes(as_written(self.moe_arch))

    @cached_property
    def _constants(self) -> dict[str, torch.Tensor]:
        return constant_tensors(self.moe_arch, self.dtype)

    @cached_property
    def float32(self) -> frozenset[str]:
        """Names of the tensors that are float32 whatever `dtype` is."""
        return float32_names(self.moe_arch)

    def _dtype(self, plan: TensorPlan) -> torch.dtype:
        return torch.float32 if self.float32 and plan.mapping.role in BALANCING_BIASES else self.dtype

    @property
    def writers(self) -> int:
        """Number of files to write in parallel.

        The number is 1 for init methods that change the copies, because these methods use all cores for one file and
        keep whole matrices in memory. The number is also 1 if some tensors are transposed, because whole tensors are
        then in memory, too.
        """
        holds = METHODS[self.spec.method].computes or any(map(is_transposed, self.shapes))
        return 1 if holds else min(WRITERS, os.cpu_count() or 1)

    def order(self, names: list[str]) -> list[str]:
        """Return the tensors of a file in writing order, in which copies of one slice are neighbours."""
        return [name for _, copies in self._copies(names) for name, _ in copies]

    def write_tensors(self, file: StreamedFile, names: list[str], advance: Callable[[int], None]) -> None:
        """Write the data of one file. Several threads may call this function, each for another file.

        Args:
            file: open file, after its header.
            names: names of the file's tensors.
            advance: called with the number of tensors that were just written.

        Raises:
            CheckpointError: a slice holds NaN, infinity or a number too large for the type.
        """
        for plan, copies in self._copies(names):
            if isinstance(plan, str):
                file.write(as_bytes(self._constants[plan].contiguous()))
            elif plan.is_drawn:
                router = plan.drawn(self.spec, self.moe_arch.hidden_size)
                cast = router.to(self.dtype)
                require_finite(router, copies[0][0], made=cast)
                file.write(as_bytes(cast))
            else:
                self._write_copies(file, plan, copies)
            advance(len(copies))

    @cached_property
    def _plans(self) -> dict[str, tuple[TensorPlan | str, int]]:
        """The plan and the expert number of every tensor. For a constant, the plan is the constant's name."""
        return {name: (name, 0) if name in self._constants else self.plan.hf_tensor(name) for name in self.shapes}

    def _copies(self, names: list[str]) -> list[tuple[TensorPlan | str, list[tuple[str, int]]]]:
        """Group the names and experts of tensors by their plan. The parts of one stacked tensor keep their order."""
        found: dict[tuple[TensorPlan | str, int], list[tuple[str, int]]] = {}
        last, run = None, 0
        for name in names:
            plan, expert = self._plans[name]
            run += plan != last
            found.setdefault((plan, run if is_stacked(name) else 0), []).append((name, expert))
            last = plan
        return [(plan, copies) for (plan, _), copies in found.items()]

    def _write_copies(self, file: StreamedFile, plan: TensorPlan, copies: list[tuple[str, int]]) -> None:
        """Write the tensors that are made from the same dense slices.

        A tensor that is transposed in the file is written whole.
        """
        source, transposed = plan.source(self.dense), is_transposed(copies[0][0])
        if stored := None if transposed else self._unchanged(source, plan):
            for _ in self._blocks(source, plan):
                pass  # the blocks are only checked, and the stored bytes are copied
            for _ in copies:
                file.copy(stored)
            return
        sizes = [torch.Size([stop - start for start, stop in slice_.bounds]).numel() for slice_ in plan.slices]
        kept = plan.method or transposed or sum(sizes) * self.dtype.itemsize <= KEPT_BYTES
        blocks = list(self._blocks(source, plan)) if kept else None
        if blocks and (plan.method or transposed) and len(blocks) > 1:
            blocks = [torch.cat(blocks)]
        if blocks and transposed and not plan.method:
            blocks = [blocks[0].T.contiguous()]
        for name, expert in copies:
            for block in blocks or self._blocks(source, plan):
                own = block.clone() if plan.method else block
                change_copies(plan, self.spec, source, [expert], [own])
                file.write(as_bytes(as_in_file(name, own) if plan.method else own))

    def _unchanged(self, source: DenseSource, plan: TensorPlan) -> ByteRange | None:
        """Return the bytes of a source file that equal the output, or None if the output must be computed."""
        slice_, *others = plan.slices
        if others or plan.method or plan.factors or plan.offset or source.dtype(slice_.name) is not self._dtype(plan):
            return None
        return source.byte_range(slice_.name, slice_.bounds)

    def _blocks(self, source: DenseSource, plan: TensorPlan) -> Iterator[torch.Tensor]:
        """Yield the expanded slices in blocks of rows.

        With an init method, each slice is one block, because the method needs the whole matrix.
        """
        for slice_ in plan.slices:
            (first, last), *rest = slice_.bounds
            row_bytes = torch.Size([stop - start for start, stop in rest]).numel() * self.dtype.itemsize
            rows = last - first if plan.method else max(1, BLOCK_BYTES // row_bytes)
            for start in range(first, last, rows):
                block = source.read(slice_.name, ((start, min(start + rows, last)), *rest))
                yield expand_slice(plan, slice_.name, block, source, self._dtype(plan)).contiguous()
                source.release()  # frees mapped pages; the page cache brings back the pages that are still needed
