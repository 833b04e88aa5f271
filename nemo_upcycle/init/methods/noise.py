"""Copies plus Gaussian noise, as in Qwen1.5-MoE and OLMoE (arXiv 2409.02060)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.init.methods import init_method


if TYPE_CHECKING:
    from nemo_upcycle.init.experts import ExpertMatrix
    from nemo_upcycle.spec import UpcycleSpec


@init_method("copies plus noise", strength="noise_std", inexact="changes every weight")
def noise(matrix: ExpertMatrix, spec: UpcycleSpec) -> None:
    """Add noise_std * s * n in float64, with n from N(0, 1) and s the standard deviation of the expert's whole matrix.

    Scaling the noise relative to the weights is our choice: one value of noise_std then serves any model. The larger
    noise_std is, the more the model differs from the dense function.
    """
    if spec.noise_std == 0:
        return
    deviation = matrix.mean_and_std()[1] * spec.noise_std
    for rows, normal_FD in matrix.normal_blocks(spec):
        here_FD = matrix.local_FD[rows]
        here_FD.copy_(here_FD.double() + deviation * normal_FD)
