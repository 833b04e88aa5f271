"""The mean of what enters the MoE over given prompts, some for each copy ("hidden" in mergekit's MoE merges)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_upcycle.errors import SpecError
from nemo_upcycle.init.routers import RouterInit, register


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec


@register
class Prompts(RouterInit):
    """A token goes to the copy whose prompts its activation looks like; `online/calibration.py` makes the rows."""

    name, from_data = "prompts", True

    def rows(
        self, spec: UpcycleSpec, layer: int, hidden_size: int, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """See `RouterInit.rows`: read from the calibration file."""
        from nemo_upcycle.init.calibration_file import calibration_of

        calibration = calibration_of(spec)
        assert calibration is not None
        return calibration.router(layer).double() * spec.router_spread

    def check(self, spec: UpcycleSpec) -> None:
        """Ask for the prompts, or for what was made of them."""
        if not spec.router_prompts and not spec.calibration:
            raise SpecError(
                field="router_prompts",
                got="none",
                expected="a file with the texts of each copy",
                fix="name it, or the <calibration> that was made of it",
            )
