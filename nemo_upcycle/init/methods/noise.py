"""Copies plus Gaussian noise, as Qwen1.5-MoE and OLMoE (arXiv 2409.02060) add it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.init.methods import Method, register


if TYPE_CHECKING:
    from nemo_upcycle.init.experts import ExpertMatrix
    from nemo_upcycle.spec import UpcycleSpec


@register
class Noise(Method):
    """w + noise_std * s * n, with n from N(0, 1) and s the standard deviation of the expert's whole matrix.

    The scale relative to the weights is ours, so that one number serves any model. Not exact: the difference from the
    dense function grows with noise_std.
    """

    name, summary, strength = "noise", "copies plus noise", "noise_std"

    def inexact_because(self, spec: UpcycleSpec) -> str:
        """Return that every weight is changed, if any noise is added."""
        return f"noise_std={spec.noise_std} changes every weight" if spec.noise_std > 0 else ""

    def change(self, spec: UpcycleSpec, matrix: ExpertMatrix) -> None:
        """Add the noise, computed in float64."""
        if spec.noise_std == 0:
            return
        deviation = matrix.mean_and_std()[1] * spec.noise_std
        for rows, normal_FD in matrix.normal_blocks(spec):
            here_FD = matrix.local_FD[rows]
            here_FD.copy_(here_FD.double() + deviation * normal_FD)
