"""What every trainer does when a run starts upcycled: fill this rank's chunks with a progress line, merge receipts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.online.receipt import UpcycleReceipt
from nemo_upcycle.online.upcycle import load_dense_into, upcycle_into
from nemo_upcycle.sources import open_dense
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.progress import ProgressLine


def fill_chunks(
    chunks: Sequence[torch.nn.Module],
    paths: Sequence[str | Path],
    spec: UpcycleSpec | None,
    non_expert_weights: str = "first",
) -> UpcycleReceipt:
    """Fill this rank's chunks from a dense checkpoint or several, with a progress line on the first rank.

    Args:
        chunks: as in `upcycle_into`.
        paths: the dense checkpoint, and its branches.
        spec: what to make of it; None loads it as it is.
        non_expert_weights: as in `open_dense`.

    Returns:
        The receipt of this rank.

    Raises:
        SpecError: an MoE model without a spec, or a spec without an MoE model.
        CheckpointError: model and checkpoint do not fit.
    """
    total = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    first = torch.distributed.get_rank() == 0
    with (
        open_dense(paths, non_expert_weights=non_expert_weights) as dense,
        ProgressLine("upcycle", total, enabled=first) as line,
    ):

        def progress(name: str, written_bytes: int) -> None:
            line.advance(written_bytes, note=name)

        if spec:
            return upcycle_into(chunks, dense, spec, progress, hashes=True)
        return load_dense_into(chunks, dense, progress)


def merge_receipts(receipt: UpcycleReceipt) -> UpcycleReceipt | None:
    """Return the receipt of all ranks on the first of them, None on the others; a collective call.

    Args:
        receipt: of this rank.
    """
    first = torch.distributed.get_rank() == 0
    receipts: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
    torch.distributed.gather_object(receipt, receipts)
    return receipt.merge(receipts) if receipts else None
