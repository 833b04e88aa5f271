"""Sigmoid scores, as in DeepSeek-V3 (arXiv 2412.19437) and GLM-4.5: the chosen ones are divided by their sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import RouterKind, register


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec

#: Up to here a logit of 17, whose sigmoid is 1 in float32, is rare: 5.3 sigma for a token of 16,384 numbers of RMS 1.
_SAFE_STD = 0.025


@register
class Sigmoid(RouterKind):
    """Exact with two experts or more a token; a single score is not divided."""

    score, order = "sigmoid", "topk_softmax"
    pre_softmax = False
    in_float32 = True

    def weight_sum(self, spec: UpcycleSpec) -> float:
        """Return 1, or the sigmoid of zero where one expert is chosen."""
        return 1.0 if spec.top_k > 1 else 0.5

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Return the sigmoid of every logit."""
        return logits_TE.sigmoid()

    def inexact_because(self, spec: UpcycleSpec) -> str:
        """Return that scores of several copies are equal, where granularity needs them apart."""
        if not (spec.needs_float32_routing and spec.router_std > _SAFE_STD):
            return ""
        return (
            f"router_std={spec.router_std:.3g} makes large logits, whose sigmoid scores are all 1 in float32:"
            " top-k then mixes copies"
        )
