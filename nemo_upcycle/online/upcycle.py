"""Fill this rank's Megatron model chunks from a dense checkpoint, in place: online upcycling.

Every rank reads only the dense slices that its own parameters need, and expands them into its own expert shard (the
idea of arXiv 2412.09952, section 2.3). No dense model is built, and nothing is gathered or sent between ranks. The
work is planned and checked as a whole first (`plan.py`); nothing is written until the plan is valid. Then `fill` moves
the bytes. A slice is usually a view of a mapped file, and is processed in small blocks: after a block is read from
memory, it is still in the processor's cache when it is checked and copied to the other experts.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import SpecError
from nemo_upcycle.init.calibration_file import calibration_of
from nemo_upcycle.init.experts import fill_copies
from nemo_upcycle.models.balancing import balancing_bias
from nemo_upcycle.models.growth import inexact_because
from nemo_upcycle.models.hybrid import hybrid_of
from nemo_upcycle.models.mapping_table import Sharding
from nemo_upcycle.models.megatron_config import changed_by, check_model, check_spec
from nemo_upcycle.online.plan import ParamPlan, RankCoords, param_plans
from nemo_upcycle.online.quantized import kept_values, quantize
from nemo_upcycle.online.receipt import ParameterRecord, UpcycleReceipt
from nemo_upcycle.online.tensor_plan import ModelPlan, change_copies, expand_slice
from nemo_upcycle.sources.base import DenseSource, left_out
from nemo_upcycle.sources.checks import check_source, rounded_because
from nemo_upcycle.sources.resolve import open_dense
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.progress import ProgressLine


#: Called after every filled parameter with its name and the bytes written.
Progress = Callable[[str, int], None]
#: Size of a block (bytes). A block is read, checked and copied to all experts before the next one is read.
_BLOCK_BYTES = 4 << 20
#: How far to fetch ahead of the fill (bytes): enough to read a cold file without a pause.
_AHEAD_BYTES = 128 << 20


def upcycle_into(
    chunks: Sequence[torch.nn.Module],
    dense: DenseSource,
    spec: UpcycleSpec | None,
    progress: Progress | None = None,
    *,
    hashes: bool = False,
) -> UpcycleReceipt:
    """Fill the local chunks of an MoE model from a dense checkpoint, in place.

    This function works under any `parallel_state`. For one seed, the gathered model is bit-identical under every
    layout. If parameters are in FP8 or FP4, their values before quantization are bit-identical. If an optimizer keeps
    master weights, create the optimizer after this call, or let it reload the weights. With FP8 or FP4 parameters, an
    optimizer gets exact master weights only if it is created after this call (`exact_masters` in the receipt).

    Args:
        chunks: this rank's chunks of Megatron's `GPTModel` or `HybridModel` (wrapped or not), one per virtual stage.
        dense: the open dense checkpoint.
        spec: how to upcycle the checkpoint; None to load it unchanged into a dense model.
        progress: called after every parameter.
        hashes: whether to record the sha256 of every parameter in the receipt, which takes longer than the upcycling.

    Returns:
        The receipt of this rank.

    Raises:
        SpecError: spec and model disagree. Nothing was written.
        CheckpointError: a parameter has no source, a source tensor is unused, or shapes disagree; nothing was written.
            The error is also raised if a dense tensor holds NaN or infinity; the model is then unfinished.

    Example:
        >>> with open_dense("hf:///models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     receipt = upcycle_into(model_chunks, dense, UpcycleSpec(num_experts=8, top_k=2))
    """
    plans = checked_plans(chunks, dense, spec)
    start_s, bytes_before = time.monotonic(), dense.bytes_read
    records = fill(plans, dense, spec, progress)
    seconds, bytes_read = time.monotonic() - start_s, dense.bytes_read - bytes_before
    if hashes:
        pairs = zip(records, (tensor for plan in plans for tensor in plan.tensors), strict=True)
        records = [replace(record, sha256=_sha256_of(tensor)) for record, tensor in pairs]
    return make_receipt(chunks[0], dense, spec, plans, records, seconds=seconds, bytes_read=bytes_read)


def load_dense_into(
    chunks: Sequence[torch.nn.Module], dense: DenseSource, progress: Progress | None = None
) -> UpcycleReceipt:
    """Load a dense checkpoint into the local chunks of a dense Megatron model, in place.

    The mapping, arguments, result and errors are the same as in `upcycle_into`.
    """
    return upcycle_into(chunks, dense, None, progress)


def _unwrap(chunk: Any) -> Any:
    # Look in `_modules`, because NeMo's wrappers also return attributes of the model inside, so `hasattr` would stop
    # at a wrapper. The parameters of a wrapper have other names than the parameters of the model.
    while "decoder" not in chunk._modules:
        if "module" not in chunk._modules:
            raise SpecError(
                "model chunk",
                got=type(chunk).__name__,
                expected="a Megatron GPTModel or HybridModel",
                fix="pass the chunks of such a model",
            )
        chunk = chunk.module
    return chunk


def checked_plans(chunks: Sequence[torch.nn.Module], dense: DenseSource, spec: UpcycleSpec | None) -> list[ParamPlan]:
    """Plan and check the fill of a model's local chunks, which may be on the meta device.

    Args:
        chunks: chunks of the model on this rank, see `upcycle_into`.
        dense: the open dense checkpoint.
        spec: how to upcycle the checkpoint; None for a dense model.

    Raises:
        SpecError, CheckpointError: see `upcycle_into`.
    """
    plan, models = ModelPlan.of(dense, spec), [_unwrap(chunk) for chunk in chunks]
    for model in models:
        hybrid = hybrid_of(model)
        if hybrid:
            hybrid.require_stages(model.pg_collection.pp.size(), len(models))
        check_spec(model.config, spec, hybrid, parent=plan.dense)
    check_source(dense, sampled=True)
    for model in models:
        check_model(model, plan.moe_arch)
    coords = RankCoords.here()
    return [one for model in models for one in param_plans(model, plan, coords)]


def fill(
    plans: list[ParamPlan], dense: DenseSource, spec: UpcycleSpec | None, progress: Progress | None
) -> list[ParameterRecord]:
    """Write every parameter.

    Args:
        plans: plans to carry out.
        dense: checkpoint that the slices are read from.
        spec: how the checkpoint is upcycled; None for a dense model.
        progress: called after every plan, in the order of the plans.

    Returns:
        How each parameter was made, in the order of the plans and of their tensors.

    Raises:
        CheckpointError: a slice holds NaN, infinity or a number too large for the model's type, or cannot be read. The
            model is then unfinished.
    """
    waiting, ahead_bytes = iter(plans), 0  # bytes prefetched beyond `plan`
    records = []
    for plan in plans:
        ahead_bytes -= plan.tensors[0].nbytes
        while ahead_bytes < _AHEAD_BYTES and (later := next(waiting, None)):
            ahead_bytes += later.tensors[0].nbytes
            for slice_ in later.made_of.slices:
                later.made_of.source(dense).prefetch(slice_.name, slice_.bounds)
        _fill(plan, dense, spec)
        if plan.quantized:
            for parameter, values in zip(plan.quantized, plan.tensors, strict=True):
                quantize(parameter, values)
        records += plan.records(spec)
        if progress:
            progress(plan.names[0], sum(tensor.nbytes for tensor in plan.tensors))
    return records


def _fill(plan: ParamPlan, dense: DenseSource, spec: UpcycleSpec | None) -> None:
    made_of, first = plan.made_of, plan.tensors[0]
    if made_of.is_drawn:
        assert spec is not None
        first.copy_(made_of.drawn(spec, dense.architecture.hidden_size))
        return
    source = made_of.source(dense)
    at_once = first.is_cuda or first.nbytes <= _BLOCK_BYTES  # True: expand the first expert as a whole, then copy it
    held: object = None
    slice_ = first
    for name, piece in made_of.slices:
        if held != (name, piece.source):  # read a slice once if several copies need it in turn (router rows)
            held, slice_ = (name, piece.source), source.read(name, piece.source)
        whole = (piece.seen(slice_), *(piece.view(tensor) for tensor in plan.tensors[: 1 if at_once else None]))
        for part, *experts in [whole] if at_once else _blocks(whole):
            expand_slice(made_of, name, part, source, first.dtype, out=experts[0])
            fill_copies(experts)
    if at_once:
        fill_copies(plan.tensors)
    if made_of.mapping.sharding is Sharding.VOCABULARY:  # zero the padding
        rows = sum(piece.rows[1] for _, piece in made_of.slices)
        first[rows:].zero_()
    if spec:
        change_copies(made_of, spec, source, plan.experts or (0,), plan.tensors)


def _blocks(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same rows of all tensors, block by block. The first tensor is the dense slice."""
    count = max(1, -(-tensors[1].nbytes // _BLOCK_BYTES))
    yield from zip(*(tensor.split(-(-tensor.shape[0] // count)) for tensor in tensors), strict=True)


def make_receipt(
    chunk: torch.nn.Module,
    dense: DenseSource,
    spec: UpcycleSpec | None,
    plans: Sequence[ParamPlan],
    records: list[ParameterRecord],
    *,
    seconds: float,
    bytes_read: int,
) -> UpcycleReceipt:
    """Return the receipt of plans that were carried out.

    Args:
        chunk: one of the model's chunks, for its configuration.
        dense: the open dense checkpoint.
        spec: how the checkpoint was upcycled.
        plans: plans that were carried out.
        records: how each parameter was made.
        seconds: time taken.
        bytes_read: bytes read from the dense checkpoint.
    """
    arch = dense.architecture
    moe_arch = arch.upcycled(spec) if spec else arch
    slices = {(plan.made_of.branch, slice_.name, slice_.bounds) for plan in plans for slice_ in plan.made_of.slices}
    dtypes = dict.fromkeys(plan.tensors[0].dtype for plan in plans if plan.made_of.slices)
    calibration = calibration_of(spec)
    reasons = (
        *(inexact_because(arch, spec) if spec else ()),
        *dense.inexact_because(),
        *(why for dtype in dtypes for why in rounded_because(dense, dtype, spec)),
        *changed_by(_unwrap(chunk), arch, spec),
    )
    return UpcycleReceipt(
        source=str(dense.path),
        source_files=dense.fingerprint(),
        spec=spec.to_dict() if spec else None,
        exact=not reasons,
        inexact_because=list(reasons),
        dense_params=arch.total_params,
        total_params=moe_arch.total_params,
        active_params=moe_arch.active_params,
        parent_experts=arch.num_experts or 0,
        parent_active_params=arch.active_params,
        parameters=records,
        bytes_read=bytes_read,
        bytes_needed=sum(
            math.prod(stop - start for start, stop in bounds) * dense.dtype(name).itemsize
            for _, name, bounds in slices
        ),
        bytes_written=sum(tensor.nbytes for plan in plans for tensor in plan.tensors),
        seconds=round(seconds, 3),
        peak_rss_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        balancing_bias=balancing_bias(_unwrap(chunk).config),
        exact_masters=all(kept_values(parameter) is not None for plan in plans for parameter in plan.quantized),
        left_out=left_out(dense.others()),
        calibration={"path": str(calibration.path), "sha256": calibration.sha256} if calibration else {},
    )


def _sha256_of(tensor: torch.Tensor) -> str:
    """Hash a parameter's bytes for the receipt."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def fill_chunks(
    chunks: Sequence[torch.nn.Module],
    paths: Sequence[str | Path],
    spec: UpcycleSpec | None,
    non_expert_weights: str = "first",
) -> UpcycleReceipt:
    """Fill this rank's chunks from one or several dense checkpoints, with a progress line on the first rank.

    Args:
        chunks: chunks of the model on this rank, see `upcycle_into`.
        paths: the dense checkpoint, followed by its branches.
        spec: how to upcycle the checkpoint; None to load it unchanged.
        non_expert_weights: "first" or "mean", see `open_dense`.

    Returns:
        The receipt of this rank.

    Raises:
        SpecError: there is no spec for an MoE model, or there is a spec for a model without experts.
        CheckpointError: model and checkpoint do not fit each other.
    """
    total = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    first = torch.distributed.get_rank() == 0
    with (
        open_dense(paths, non_expert_weights=non_expert_weights) as dense,
        ProgressLine("upcycle", total, enabled=first) as line,
    ):

        def progress(name: str, written_bytes: int) -> None:
            line.advance(written_bytes, note=name)

        return upcycle_into(chunks, dense, spec, progress, hashes=spec is not None)


def merge_receipts(receipt: UpcycleReceipt) -> UpcycleReceipt | None:
    """Return the merged receipt of all ranks on the first rank, and None on all other ranks. This is collective.

    Args:
        receipt: receipt of this rank.
    """
    first = torch.distributed.get_rank() == 0
    receipts: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
    torch.distributed.gather_object(receipt, receipts)
    return receipt.merge(receipts) if receipts else None
