"""Step-0 equivalence: does the upcycled Megatron model compute the same function as its dense parent?

Three models are compared on real text, on one rank, before any training: the parent in Hugging Face's implementation,
the parent in Megatron, and the upcycled model in Megatron. The parent in Hugging Face is compared with the
upcycled model in float32, across two implementations.

Comparing the two Megatron models isolates upcycling, so this comparison is done in float64 as well. In float32 the
combine weights sum to one only up to rounding, which disturbs every layer by one unit in the last place. Thirty layers
amplify this error as much as they amplify any reordering of a sum in the parent itself. To show the size of this
effect, the parent's float32 result is also compared with its float64 result.

No model is ever in memory as a whole: the weights of an embedding, a layer or an output layer are filled when
this part computes (`paging.py`). Memory does hold five tensors of logits at a time, [B, S, V] each, and the output of
every layer, [B, S, D].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from nemo_upcycle.convert.compared_logits import compare_logits
from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.cpu.one_rank import one_rank
from nemo_upcycle.models.growth import inexact_because
from nemo_upcycle.models.hybrid import hybrid_of
from nemo_upcycle.models.mapping import hf_names
from nemo_upcycle.models.megatron_config import require_buildable
from nemo_upcycle.models.sharding import float32_names
from nemo_upcycle.online.receipt import UpcycleReceipt
from nemo_upcycle.online.upcycle import make_receipt
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.checks import rounded_because
from nemo_upcycle.sources.resolve import open_dense
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.paged_models import PagedWeights, paged_hugging_face, paged_megatron
from nemo_upcycle.trainers.paging import PagedModel
from nemo_upcycle.utils.progress import ProgressLine


#: Largest differences of logits that count as rounding. TOLERANCE: limit between two implementations, in float32.
#: TOLERANCE_SAME_STACK: limit within one implementation, in float64 (Megatron still computes the router's softmax in
#: float32).
TOLERANCE = 2e-4
TOLERANCE_SAME_STACK = 2e-5
#: How often every layer is filled: once in the Hugging Face model, twice in each Megatron model. An export adds one.
_VISITS = 5


@torch.no_grad()
def megatron_logits(
    model: torch.nn.Module, tokens_BS: torch.Tensor, device: torch.device | None = None
) -> torch.Tensor:
    """Return a Megatron model's logits [B, S, V] on the CPU, in the type of the model's weights.

    Args:
        model: Megatron model.
        tokens_BS: token ids, [B, S].
        device: where to compute; None: where the model's weights are.
    """
    device = device or next(model.parameters()).device
    length = tokens_BS.shape[1]
    positions_BS = torch.arange(length, device=device).expand_as(tokens_BS)
    masked = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]
    return model(tokens_BS.to(device), positions_BS, masked).cpu()


@contextmanager
def _layer_outputs(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of the layers that correspond to the dense parent's layers, in order."""
    outputs: list[torch.Tensor] = []
    layers, hybrid = list(cast("Any", model).decoder.layers), hybrid_of(model)
    if hybrid:
        layers = [layers[index] for index in hybrid.networks]
    hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[-1][0].detach())) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def check_step0(
    moe_config: Any,
    dense_config: Any,
    dense_folder: Path,
    spec: UpcycleSpec,
    tokens_BS: torch.Tensor,
    step0_folder: Path | None,
) -> UpcycleReceipt:
    """Upcycle on one rank in float32, compare with the dense parent, and export the model of step 0.

    Args:
        moe_config: configuration of the upcycled model; see `paged_megatron`.
        dense_config: configuration of the parent.
        dense_folder: the parent's Hugging Face folder.
        spec: how to upcycle.
        tokens_BS: token ids of real text, [B, S].
        step0_folder: Hugging Face folder to write the upcycled model of step 0 to; None writes no folder. The weights
            have the dense parent's type if the model computes the same in that type, otherwise float32.

    Returns:
        The receipt. Its `equivalence` has `max_abs_logit_diff` (parent in Hugging Face against upcycled model in
        Megatron, float32), `max_abs_logit_diff_same_stack` (both in Megatron, float64; `..._float32` for float32),
        `parent_float32_rounding` (parent in Megatron, float32 against float64), `layer_relative_diff` (both in
        Megatron, float64, after every layer, to show where they diverge), and the tolerances.
    """
    visits = (_VISITS + bool(step0_folder)) * dense_config.num_layers
    with one_rank(), open_dense(dense_folder) as dense, ProgressLine("check step 0", visits) as line:
        require_buildable(dense.architecture)  # Mamba layers run only on GPUs, and not in float32 or float64

        def followed(paged: PagedModel, note: str) -> PagedModel:
            paged.progress = lambda part: line.advance(note=note) if "layers." in part else None
            return paged

        parent = followed(paged_hugging_face(dense_folder, dense), "parent in Hugging Face")
        with torch.no_grad():
            parent_BSV = parent.model(tokens_BS).logits
        parent.clear()
        parent, _ = paged_megatron(dense_config, dense, None)
        dense_run = _run(followed(parent, "parent in Megatron"), dense, tokens_BS)
        model, plans = paged_megatron(moe_config, dense, spec)
        if step0_folder:
            _export(followed(model, "export of step 0"), dense, spec, dense_folder, step0_folder)
        moe_run = _run(followed(model, "upcycled model in Megatron"), dense, tokens_BS)
        records = [record for plan in plans for record in plan.records(spec)]
        receipt = make_receipt(
            model.model, dense, spec, plans, records, seconds=moe_run.fill_s, bytes_read=moe_run.bytes_read
        )
        receipt.equivalence = _equivalence(parent_BSV, dense_run, moe_run, receipt.exact)
    receipt.layout = {"tensor": 1, "pipeline": 1, "expert": 1, "data": 1}
    return receipt


def _export(paged: PagedModel, dense: DenseSource, spec: UpcycleSpec, dense_folder: Path, step0_folder: Path) -> None:
    """Write the upcycled model, in the dense parent's type if that type holds the copied weights exactly."""
    names = set(hf_names(dense.architecture)) - float32_names(dense.architecture)
    own = functools.reduce(torch.promote_types, map(dense.dtype, names))
    arch = dense.architecture.upcycled(spec)
    rounds = any(rounded_because(dense, own, spec, written=arch))
    dtype = torch.float32 if rounds or inexact_because(dense.architecture, spec) else own
    export_weights(PagedWeights(paged, dtype), arch, dense_folder, step0_folder, dtype=dtype)


@dataclass(frozen=True)
class _Run:
    """One Megatron model's logits in float32 and float64, and the outputs of its layers in float64.

    `fill_s` and `bytes_read` are the seconds and the bytes that it took to fill the model once.
    """

    single_BSV: torch.Tensor
    double_BSV: torch.Tensor
    layers: list[torch.Tensor]
    fill_s: float
    bytes_read: int


def _run(paged: PagedModel, dense: DenseSource, tokens_BS: torch.Tensor) -> _Run:
    """Run a model in float32 and in float64."""
    paged.to(torch.float32)
    bytes_before, paged.fill_s = dense.bytes_read, 0.0
    single_BSV = megatron_logits(paged.model, tokens_BS, paged.device)
    fill_s, bytes_read = paged.fill_s, dense.bytes_read - bytes_before
    paged.to(torch.float64)
    with _layer_outputs(paged.model) as layers:
        double_BSV = megatron_logits(paged.model, tokens_BS, paged.device)
    paged.clear()
    return _Run(single_BSV, double_BSV, layers, fill_s, bytes_read)


def _equivalence(parent_BSV: torch.Tensor, dense: _Run, moe: _Run, exact: bool) -> dict[str, Any]:
    across = compare_logits(parent_BSV, moe.single_BSV)
    within = compare_logits(dense.double_BSV, moe.double_BSV, dense.layers, moe.layers)
    return {
        "max_abs_logit_diff": across.max_abs,
        "max_abs_logit_diff_same_stack": within.max_abs,
        "max_abs_logit_diff_same_stack_float32": compare_logits(dense.single_BSV, moe.single_BSV).max_abs,
        "parent_float32_rounding": compare_logits(dense.single_BSV.double(), dense.double_BSV).max_abs,
        "mean_abs_logit_diff": across.mean_abs,
        "same_argmax": across.same_argmax,
        "max_abs_logit": float(parent_BSV.abs().max()),
        "layer_relative_diff": list(within.layer_relative),
        "tokens_compared": across.tokens,
        "tolerance": TOLERANCE if exact else None,
        "tolerance_same_stack": TOLERANCE_SAME_STACK if exact else None,
        "within_tolerance": across.max_abs <= TOLERANCE and within.max_abs <= TOLERANCE_SAME_STACK,
    }
