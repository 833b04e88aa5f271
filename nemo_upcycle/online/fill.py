"""Carries out the plan: reads dense slices, checks them and expands them into every expert of this rank.

A slice, mostly a view of a mapped file, goes through in blocks so small that what came from memory once is still in
the processor's cache when it is checked and copied to the other experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nemo_upcycle.init.experts import fill_copies
from nemo_upcycle.models.mapping import Sharding
from nemo_upcycle.online.plan import ParamPlan
from nemo_upcycle.online.receipt import ParameterRecord
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.tensor_plan import change_copies, expand_slice


#: Called after every filled parameter with its name and the bytes written.
Progress = Callable[[str, int], None]
#: What is read, checked and copied to all experts before the next is read.
_BLOCK_BYTES = 4 << 20
#: What is fetched while something is filled: enough to read a cold file without a pause.
_AHEAD_BYTES = 128 << 20


def fill(
    plans: list[ParamPlan], dense: DenseSource, spec: UpcycleSpec | None, progress: Progress | None
) -> list[ParameterRecord]:
    """Write every parameter.

    Args:
        plans: what to fill, and of what.
        dense: where the slices come from.
        spec: what becomes of them; None for a dense model.
        progress: called after every plan, in their order.

    Returns:
        How each parameter was made, in the order of the plans and of their tensors.

    Raises:
        CheckpointError: a slice holds NaN, infinity or a number too large for the model's type, or cannot be read. The
            model is then unfinished.
    """
    waiting, ahead_bytes = iter(plans), 0  # prefetched beyond `plan`
    records = []
    for plan in plans:
        ahead_bytes -= plan.tensors[0].nbytes
        while ahead_bytes < _AHEAD_BYTES and (later := next(waiting, None)):
            ahead_bytes += later.tensors[0].nbytes
            for slice_ in later.made_of.slices:
                later.made_of.source(dense).prefetch(slice_.name, slice_.bounds)
        _fill(plan, dense, spec)
        records += plan.records(spec)
        if progress:
            progress(plan.names[0], sum(tensor.nbytes for tensor in plan.tensors))
    return records


def _fill(plan: ParamPlan, dense: DenseSource, spec: UpcycleSpec | None) -> None:
    made_of, first = plan.made_of, plan.tensors[0]
    if made_of.is_router:
        assert spec is not None
        first.copy_(made_of.drawn(spec, dense.architecture.hidden_size))
        return
    source = made_of.source(dense)
    at_once = first.is_cuda or first.nbytes <= _BLOCK_BYTES  # the other experts are copies of the whole first one
    for name, piece in made_of.slices:
        slice_ = source.read(name, piece.source)
        whole = (piece.seen(slice_), *(piece.view(tensor) for tensor in plan.tensors[: 1 if at_once else None]))
        for part, *experts in [whole] if at_once else _blocks(whole):
            expand_slice(made_of, name, part, source, first.dtype, out=experts[0])
            fill_copies(experts)
    if at_once:
        fill_copies(plan.tensors)
    if made_of.mapping.sharding is Sharding.VOCABULARY:  # padding
        rows = sum(piece.rows[1] for _, piece in made_of.slices)
        first[rows:].zero_()
    if spec:
        change_copies(made_of, spec, source, plan.experts, plan.tensors)


def _blocks(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same rows of all tensors, block by block; the first tensor is the dense slice."""
    count = max(1, -(-tensors[1].nbytes // _BLOCK_BYTES))
    yield from zip(*(tensor.split(-(-tensor.shape[0] // count)) for tensor in tensors), strict=True)
