"""The mean of what enters the MoE over given prompts, some for each copy ("hidden" in mergekit's MoE merges)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.errors import SpecError
from nemo_upcycle.init.routers import CalibratedInit, register


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.init.calibration import LayerSample
    from nemo_upcycle.spec import UpcycleSpec


@register
class Prompts(CalibratedInit):
    """A token goes to the copy whose prompts its activation looks like."""

    name, texts = "prompts", "prompts"

    def fit(self, sample: LayerSample) -> torch.Tensor:
        """Return each copy's mean activation as a unit vector, [C, D] in float64."""
        import torch
        from torch.nn.functional import normalize

        sums_CD = torch.zeros(sample.copies, sample.batches[0].shape[1], dtype=torch.float64)
        for label, batch_ND in zip(sample.labels, sample.batches, strict=True):
            sums_CD[label] += batch_ND.sum(0, dtype=torch.float64)
        return normalize(sums_CD, dim=1)

    def check(self, spec: UpcycleSpec) -> None:
        """Ask for the prompts, or for what was made of them."""
        if not spec.router_prompts and not spec.calibration:
            raise SpecError(
                field="router_prompts",
                got="none",
                expected="a file with the texts of each copy",
                fix="name it, or the <calibration> that was made of it",
            )
