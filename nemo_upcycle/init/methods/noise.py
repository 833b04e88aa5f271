"""Copies plus Gaussian noise, as Qwen1.5-MoE and OLMoE (arXiv 2409.02060) add it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.init.methods import init_method


if TYPE_CHECKING:
    from nemo_upcycle.init.experts import ExpertMatrix
    from nemo_upcycle.spec import UpcycleSpec


@init_method("copies plus noise", strength="noise_std", inexact="changes every weight")
def noise(matrix: ExpertMatrix, spec: UpcycleSpec) -> None:
    """Add noise_std * s * n in float64, with n from N(0, 1) and s the standard deviation of the expert's whole matrix.

    The scale relative to the weights is ours, so that one number serves any model. The difference from the dense
    function grows with noise_std.
    """
    if spec.noise_std == 0:
        return
    deviation = matrix.mean_and_std()[1] * spec.noise_std
    for rows, normal_FD in matrix.normal_blocks(spec):
        here_FD = matrix.local_FD[rows]
        here_FD.copy_(here_FD.double() + deviation * normal_FD)
