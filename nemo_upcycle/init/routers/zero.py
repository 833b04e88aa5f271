"""Router initialisation with zeros: all experts are equally likely, and chance decides which experts top-k chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import router_init


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec


@router_init(always_zero=True)
def zero(spec: UpcycleSpec, layer: int, hidden_size: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return zeros, which make softmax before top-k exact."""
    import torch

    return torch.zeros((len(generators), hidden_size), dtype=torch.float64)
