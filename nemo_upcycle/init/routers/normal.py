"""Normal numbers around zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import RouterInit, register


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec


@register
class Normal(RouterInit):
    """N(0, router_std^2)."""

    name = "normal"

    def rows(
        self, spec: UpcycleSpec, layer: int, hidden_size: int, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """See `RouterInit.rows`."""
        from nemo_upcycle.init.rng import normal

        return normal((hidden_size,), generators) * spec.router_std
