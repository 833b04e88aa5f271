"""Ridge regression of the blend's sources, a copy for each, in closed form (DUME, arXiv 2603.29765)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import CalibratedInit, register


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.init.calibration import LayerSample

#: The penalty, over the mean eigenvalue of the activations' second moments.
PENALTY = 0.01


@register
class Ridge(CalibratedInit):
    """A token goes to the copy of the source that its activation looks like; copies are in the order of the names."""

    name, texts = "ridge", "sources"

    def fit(self, sample: LayerSample) -> torch.Tensor:
        """Return (X^T X + penalty)^-1 X^T Y, transposed: [C, D] in float64. Y is 1 for the token's source, else 0."""
        import torch

        width = sample.batches[0].shape[1]
        moments_DD = torch.zeros(width, width, dtype=torch.float64)
        for part_DD in sample.run(lambda batch_ND: batch_ND.T @ batch_ND, sample.batches):
            moments_DD += part_DD
        sums_CD = torch.zeros(sample.copies, width, dtype=torch.float64)
        for label, batch_ND in zip(sample.labels, sample.batches, strict=True):
            sums_CD[label] += batch_ND.sum(0, dtype=torch.float64)
        moments_DD.diagonal().add_(PENALTY * float(moments_DD.trace()) / width)
        return torch.cholesky_solve(sums_CD.T, torch.linalg.cholesky(moments_DD)).T.contiguous()
