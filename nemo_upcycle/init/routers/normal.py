"""Router initialisation with normal numbers of mean zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import router_init


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec


@router_init()
def normal(spec: UpcycleSpec, layer: int, hidden_size: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw the rows from N(0, router_std^2)."""
    from nemo_upcycle.init import rng

    return rng.normal((hidden_size,), generators) * spec.router_std
