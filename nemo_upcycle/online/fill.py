"""Does what the plan of `placement.py` says: reads dense slices, checks them and expands them into every expert.

A slice, mostly a view of a mapped file, goes through in blocks so small that what came from memory once is still in
the processor's cache when it is checked and copied to the other experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from nemo_upcycle.init.experts import ExpertMatrix, change, fill_copies, output_factor
from nemo_upcycle.init.router import router_weight
from nemo_upcycle.models.mapping import Sharding
from nemo_upcycle.online.plan import ParamPlan, filled_bytes
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.checks import require_finite
from nemo_upcycle.spec import UpcycleSpec


#: Called after every filled parameter with its name and the bytes written.
Progress = Callable[[str, int], None]
#: What is read, checked and copied to all experts before the next is read.
_BLOCK_BYTES = 4 << 20
#: What is fetched while something is filled: so much that a cold file is read without a pause.
_AHEAD_BYTES = 128 << 20


def fill(targets: list[ParamPlan], dense: DenseSource, spec: UpcycleSpec | None, progress: Progress | None) -> None:
    """Write every target.

    Args:
        targets: what to fill, and of what.
        dense: where the slices come from.
        spec: what becomes of them; None for a dense model.
        progress: called after every target, in their order.

    Raises:
        CheckpointError: a slice holds NaN, infinity or a number too large for the model's type, or cannot be read. The
            model is then unfinished.
    """
    waiting, ahead_bytes = iter(targets), 0  # of what is expected beyond `target`
    for target in targets:
        ahead_bytes -= target.tensors[0].nbytes
        while ahead_bytes < _AHEAD_BYTES and (later := next(waiting, None)):
            ahead_bytes += later.tensors[0].nbytes
            for name, bounds in filled_bytes(later):
                _source(later, dense).prefetch(name, bounds)
        _fill(target, dense, spec)
        if progress:
            progress(target.names[0], sum(tensor.nbytes for tensor in target.tensors))


def scale_of(target: ParamPlan, spec: UpcycleSpec | None) -> float:
    """Return the factor on a target: of the spec's formulas, for what is behind an expert's activation."""
    if spec is None:
        return 1.0
    return output_factor(spec, target.row.role, target.experts[0] if target.experts else 0)


def _source(target: ParamPlan, dense: DenseSource) -> DenseSource:
    return dense if target.branch is None else dense.branches()[target.branch]


def _fill(target: ParamPlan, dense: DenseSource, spec: UpcycleSpec | None) -> None:
    first = target.tensors[0]
    if target.row.role == "router":
        assert spec is not None
        assert target.layer is not None
        first.copy_(router_weight(spec, target.layer, dense.architecture.hidden_size))
        return
    if target.row.role == "router_bias":
        first.zero_()
        return
    source, scale = _source(target, dense), scale_of(target, spec)
    at_once = first.is_cuda or first.nbytes <= _BLOCK_BYTES  # the other experts are copies of the whole first one
    for piece in target.pieces:
        name = target.hf_name(piece.part)
        slice_ = source.read(name, piece.source)
        whole = (piece.seen(slice_), *(piece.view(tensor) for tensor in target.tensors[: 1 if at_once else None]))
        for part, *experts in [whole] if at_once else _blocks(whole):
            experts[0].copy_(part)
            if scale != 1.0:
                experts[0].mul_(scale)
            require_finite(part, name, source, made=experts[0])
            fill_copies(experts)
    if at_once:
        fill_copies(target.tensors)
    if target.row.sharding is Sharding.VOCABULARY:  # padding
        rows = sum(piece.rows[1] for piece in target.pieces)
        first[rows:].zero_()
    if target.experts and spec and spec.method != "copy":
        for matrix in _matrices(target, source, scale):
            change(spec, matrix)


def _blocks(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same rows of tensors that have as many, the first the dense slice, block by block."""
    count = max(1, -(-tensors[1].nbytes // _BLOCK_BYTES))
    yield from zip(*(tensor.split(-(-tensor.shape[0] // count)) for tensor in tensors), strict=True)


def _matrices(target: ParamPlan, source: DenseSource, scale: float) -> Iterator[ExpertMatrix]:
    """Yield the gate, up or down matrices of the target's experts, neuron by neuron; biases are not changed."""
    if target.tensors[0].dim() < 2:
        return
    is_down = target.row.sharding is Sharding.NEURON_COLUMNS
    parts = ("down",) if is_down else ("gate", "up")[-len(target.row.hf) :]
    assert target.layer is not None
    for expert, tensor in zip(target.experts, target.tensors, strict=True):
        views = [tensor.T] if is_down else list(tensor.chunk(len(parts)))
        for number, (part, view) in enumerate(zip(parts, views, strict=True)):
            whole = functools.cache(functools.partial(_whole, target, source, number, view, scale))
            yield ExpertMatrix(target.layer, expert, part, target.shard.rank * view.shape[0], view, whole)


def _whole(target: ParamPlan, source: DenseSource, part: int, local_FD: torch.Tensor, scale: float) -> torch.Tensor:
    """Return all neurons of an expert's matrix; read once more where tensor parallelism left some of them here."""
    if target.shard.size == 1:
        return local_FD.clone()
    assert target.source is not None
    name, count = target.hf_name(part), local_FD.shape[0] * target.shard.size
    neurons = (target.first_neuron, target.first_neuron + count)
    rows, columns = source.shape(name)
    if target.row.sharding is Sharding.NEURON_COLUMNS:
        whole_FD = source.read(name, [(0, rows), neurons]).T
    else:
        whole_FD = source.read(name, [neurons, (0, columns)])
    return whole_FD.to(local_FD) * scale
