"""The experts of an upcycled layer, made in place from the dense feed-forward network."""

from __future__ import annotations

import torch


def fill_copies(experts: list[torch.Tensor], scale: float = 1.0) -> None:
    """Make every expert's matrix the first one's, times `scale`. Exact: the copies carry the same bits.

    The dense slice was read straight into the first expert, so no copy of it exists anywhere else.

    Args:
        experts: the matrices of this rank's experts, one shape; the first holds the dense slice.
        scale: factor on all of them (only a down projection has one, see `UpcycleSpec.down_scale`).
    """
    if scale != 1.0:
        experts[0].mul_(scale)
    for other in experts[1:]:
        other.copy_(experts[0])
