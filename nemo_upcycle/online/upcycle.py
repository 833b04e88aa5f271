"""Fills the Megatron model chunks of this rank from a dense checkpoint, in place: online upcycling.

Every rank reads only the dense slices that its own parameters are made of and expands them into its own expert shard
(the idea of arXiv 2412.09952, section 2.3). No dense model is built, nothing is gathered or sent between ranks.
The work is planned and checked as a whole first (`plan.py`); nothing is written until the plan is sound. Then
`fill.py` moves the bytes.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.hybrid import hybrid_of
from nemo_upcycle.models.megatron_config import changed_by, check_model, check_spec
from nemo_upcycle.online.fill import Progress, fill
from nemo_upcycle.online.plan import ParamPlan, RankCoords, param_plans
from nemo_upcycle.online.receipt import ParameterRecord, UpcycleReceipt
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.checks import check_source, rounded_because
from nemo_upcycle.sources.several_parents import require_copies
from nemo_upcycle.spec import UpcycleSpec


def upcycle_into(
    chunks: Sequence[torch.nn.Module],
    dense: DenseSource,
    spec: UpcycleSpec,
    progress: Progress | None = None,
    *,
    hashes: bool = False,
) -> UpcycleReceipt:
    """Make the local chunks of an MoE model from a dense checkpoint, in place.

    Works under any `parallel_state`. For one seed the gathered model is bit-identical whatever the layout. Optimizers
    that keep master weights must reload them afterwards.

    Args:
        chunks: this rank's chunks of Megatron's `GPTModel` or `HybridModel` (wrapped or not), one per virtual stage.
        dense: the open dense checkpoint.
        spec: what to make of it.
        progress: called after every parameter.
        hashes: note the sha256 of every parameter in the receipt, which takes longer than the upcycling.

    Returns:
        The receipt of this rank.

    Raises:
        SpecError: spec and model disagree. Nothing was written.
        CheckpointError: a parameter has no source, a source tensor is unused, or shapes disagree; nothing was written.
            Or a dense tensor holds NaN or infinity: the model is then unfinished.

    Example:
        >>> with open_dense("hf:///models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     receipt = upcycle_into(model_chunks, dense, UpcycleSpec(num_experts=8, top_k=2))
    """
    return _fill(chunks, dense, spec, progress, hashes)


def load_dense_into(
    chunks: Sequence[torch.nn.Module], dense: DenseSource, progress: Progress | None = None
) -> UpcycleReceipt:
    """Load a dense checkpoint into the local chunks of a dense Megatron model, in place, by the same mapping.

    Args, Returns and Raises as in `upcycle_into`.
    """
    return _fill(chunks, dense, None, progress, False)


def _unwrap(chunk: Any) -> Any:
    # Not by attribute: NeMo's wrappers hand out what is inside them, under other parameter names than their own.
    while "decoder" not in chunk._modules:
        if "module" not in chunk._modules:
            raise SpecError(
                "model chunk",
                got=type(chunk).__name__,
                expected="a Megatron GPTModel or HybridModel",
                fix="pass the chunks",
            )
        chunk = chunk.module
    return chunk


def checked_plans(chunks: Sequence[torch.nn.Module], dense: DenseSource, spec: UpcycleSpec | None) -> list[ParamPlan]:
    """Return what is to be filled in the local chunks of a model, also on the meta device, and of what.

    Args:
        chunks: as in `upcycle_into`.
        dense: the open dense checkpoint.
        spec: what to make of it; None for a dense model.

    Raises:
        SpecError, CheckpointError: as in `upcycle_into`.
    """
    arch = dense.architecture
    moe_arch = arch.upcycled(spec) if spec else arch
    models = [_unwrap(chunk) for chunk in chunks]
    for model in models:
        hybrid = hybrid_of(model)
        if hybrid:
            hybrid.require_stages(model.pg_collection.pp.size(), len(models))
        if spec:
            check_spec(model.config, spec, hybrid)
        elif experts := model.config.num_moe_experts:
            fix = "use upcycle_into (in a recipe: give a spec)"
            raise SpecError("num_moe_experts", got=experts, expected="none", fix=fix)
    check_source(dense, sampled=True)
    for model in models:
        check_model(model, moe_arch)
    coords, parents = RankCoords.here(), len(dense.branches())
    plans = [plan for model in models for plan in param_plans(model, arch, moe_arch, spec, coords, parents)]
    if spec:
        require_copies(dense, spec.copies)
    return plans


def _fill(
    chunks: Sequence[torch.nn.Module],
    dense: DenseSource,
    spec: UpcycleSpec | None,
    progress: Progress | None,
    hashes: bool,
) -> UpcycleReceipt:
    plans = checked_plans(chunks, dense, spec)
    start_s, bytes_before = time.monotonic(), dense.bytes_read
    records = fill(plans, dense, spec, progress)
    seconds, bytes_read = time.monotonic() - start_s, dense.bytes_read - bytes_before
    if hashes:
        pairs = zip(records, (tensor for plan in plans for tensor in plan.tensors), strict=True)
        records = [replace(record, sha256=_sha256(tensor)) for record, tensor in pairs]
    return make_receipt(chunks[0], dense, spec, plans, records, seconds=seconds, bytes_read=bytes_read)


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
        chunk: one of the model's, for its configuration.
        dense: the open dense checkpoint.
        spec: what was made of it.
        plans: what was to be filled.
        records: how it was made.
        seconds: what it took.
        bytes_read: of the dense checkpoint.
    """
    arch = dense.architecture
    moe_arch = arch.upcycled(spec) if spec else arch
    slices = {(plan.made_of.branch, slice_.name, slice_.bounds) for plan in plans for slice_ in plan.made_of.slices}
    dtypes = dict.fromkeys(plan.tensors[0].dtype for plan in plans if plan.made_of.slices)
    reasons = (
        *(spec.inexact_because if spec else ()),
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
        parameters=records,
        bytes_read=bytes_read,
        bytes_needed=sum(
            math.prod(stop - start for start, stop in bounds) * dense.dtype(name).itemsize
            for _, name, bounds in slices
        ),
        bytes_written=sum(tensor.nbytes for plan in plans for tensor in plan.tensors),
        seconds=round(seconds, 3),
        peak_rss_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    )


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
