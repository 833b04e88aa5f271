"""Fills the Megatron model chunks of this rank from a dense checkpoint, in place: online upcycling.

Every rank reads only the dense slices that its own parameters are made of and expands them into its own expert shard
(the idea of arXiv 2412.09952, section 2.3). No dense model is built, nothing is gathered or sent between ranks.
The work is planned and checked as a whole first (`placement.py`); nothing is written until the plan is sound. Then
`filling.py` moves the bytes.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.megatron_config import changed_by, check_model, check_spec
from nemo_upcycle.online.fill import Progress, fill, scale_of
from nemo_upcycle.online.plan import ParamPlan, RankCoords, filled_bytes, param_plans
from nemo_upcycle.online.receipt import ParameterRecord, UpcycleReceipt
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.branches import require_copies
from nemo_upcycle.sources.checks import check_shapes, check_source, rounded_because
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
        chunks: this rank's Megatron `GPTModel` chunks (wrapped or not), one per virtual pipeline stage.
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
    models = [_unwrap(chunk) for chunk in chunks]
    for model in models:
        check_spec(model.config, spec)
    return _fill(models, dense, spec, progress, hashes)


def load_dense_into(
    chunks: Sequence[torch.nn.Module], dense: DenseSource, progress: Progress | None = None
) -> UpcycleReceipt:
    """Load a dense checkpoint into the local chunks of a dense Megatron model, in place, by the same mapping.

    Args, Returns and Raises as in `upcycle_into`.
    """
    models = [_unwrap(chunk) for chunk in chunks]
    for model in models:
        if model.config.num_moe_experts:
            raise SpecError(
                "num_moe_experts",
                got=model.config.num_moe_experts,
                expected="none",
                fix="use upcycle_into, or give UpcycleConfig a spec",
            )
    return _fill(models, dense, None, progress, False)


def _unwrap(chunk: Any) -> Any:
    # Not by attribute: NeMo's wrappers hand out what is inside them, under other parameter names than their own.
    while "decoder" not in chunk._modules:
        if "module" not in chunk._modules:
            raise SpecError(
                "model chunk", got=type(chunk).__name__, expected="a Megatron GPTModel", fix="pass the chunks"
            )
        chunk = chunk.module
    return chunk


def _fill(
    models: list[Any], dense: DenseSource, spec: UpcycleSpec | None, progress: Progress | None, hashes: bool
) -> UpcycleReceipt:
    arch = dense.architecture
    made = arch.upcycled(spec) if spec else arch
    check_source(dense, sampled=True)
    for model in models:
        check_model(model, made)
    place, branches = RankCoords.here(), len(dense.branches())
    targets = [
        target for model in models for target in param_plans(model, arch, made, spec, place, lambda c: c % branches)
    ]
    check_shapes(dense, sorted({target.hf_name(piece.part) for target in targets for piece in target.pieces}))
    if spec:
        require_copies(dense, spec.copies)
    start_s, bytes_before = time.monotonic(), dense.bytes_read
    fill(targets, dense, spec, progress)
    seconds = time.monotonic() - start_s
    dtypes = dict.fromkeys(target.tensors[0].dtype for target in targets if target.pieces)
    reasons = (
        *(spec.inexact_because if spec else ()),
        *dense.inexact_because(),
        *(why for dtype in dtypes for why in rounded_because(dense, dtype, spec)),
        *changed_by(models[0], arch, spec),
    )
    return UpcycleReceipt(
        source=str(dense.path),
        source_files=dense.fingerprint(),
        spec=spec.to_dict() if spec else None,
        exact=not reasons,
        inexact_because=list(reasons),
        dense_params=arch.total_params,
        total_params=made.total_params,
        active_params=made.active_params,
        parameters=[record for target in targets for record in _records(target, spec, hashes)],
        bytes_read=dense.bytes_read - bytes_before,
        bytes_needed=_bytes_needed(targets, dense),
        bytes_written=sum(tensor.nbytes for target in targets for tensor in target.tensors),
        seconds=round(seconds, 3),
        peak_rss_gib=round(_peak_rss_gib(), 3),
    )


def _bytes_needed(targets: list[ParamPlan], dense: DenseSource) -> int:
    """Return the bytes of the distinct slices that this rank's parameters are made of."""
    slices = {(target.branch, *slice_) for target in targets for slice_ in filled_bytes(target)}
    return sum(
        math.prod(stop - start for start, stop in source) * dense.dtype(name).itemsize for _, name, source in slices
    )


def _records(target: ParamPlan, spec: UpcycleSpec | None, hashes: bool) -> list[ParameterRecord]:
    sources: tuple[str, ...] = ()
    if target.row.role == "router":
        assert spec is not None
        made_by = f"router_init={spec.router_init}, std={spec.router_std}, seed={spec.seed}"
    elif target.row.role == "router_bias":
        made_by = "zero"
    else:
        branch = f"{target.branch}:" if target.branch else ""
        sources = tuple(
            f"{branch}{name}[{', '.join(f'{start}:{stop}' for start, stop in bounds)}]"
            for name, bounds in filled_bytes(target)
        )
        made_by = "copied" if (scale := scale_of(target, spec)) == 1 else f"copied, times {scale:.6g}"
        if spec and target.experts and spec.method != "copy" and target.tensors[0].dim() > 1:
            amount = {"noise": f"std {spec.noise_std}", "drop": f"ratio {spec.drop_ratio}"}[spec.method]
            made_by += f", {spec.method} ({amount}, seed {spec.seed})"
    first = target.tensors[0]
    shape, dtype = tuple(first.shape), str(first.dtype).removeprefix("torch.")
    return [
        ParameterRecord(name, shape, dtype, made_by, sources, _sha256(tensor) if hashes else None)
        for name, tensor in zip(target.names, target.tensors, strict=True)
    ]


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def _peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
