"""Zeros: every expert is as likely, and top-k leaves to chance which are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import RouterInit, register


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec


@register
class Zero(RouterInit):
    """Makes softmax before top-k exact."""

    name = "zero"

    def is_zero(self, spec: UpcycleSpec) -> bool:
        """See `RouterInit.is_zero`."""
        return True

    def rows(
        self, spec: UpcycleSpec, layer: int, hidden_size: int, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """See `RouterInit.rows`."""
        import torch

        return torch.zeros((len(generators), hidden_size), dtype=torch.float64)
