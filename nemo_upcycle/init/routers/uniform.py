"""Router initialisation with uniform numbers of mean zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import router_init


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec


@router_init()
def uniform(spec: UpcycleSpec, layer: int, hidden_size: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw uniformly between -sqrt(3) router_std and sqrt(3) router_std, so the standard deviation is router_std."""
    from nemo_upcycle.init import rng

    bound = math.sqrt(3.0) * spec.router_std
    return (2.0 * rng.uniform((hidden_size,), generators) - 1.0) * bound
