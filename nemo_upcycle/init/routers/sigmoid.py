"""Sigmoid scores, as in DeepSeek-V3 (arXiv 2412.19437) and GLM-4.5: the chosen ones are divided by their sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import RouterKind, register
from nemo_upcycle.spec import ROUTER_INITS


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec

#: Up to here a logit of 17, whose sigmoid is 1 in float32, is rare: 5.3 sigma for a token of 16,384 numbers of RMS 1,
#: and as many spreads of a router from data.
_SAFE_STD, _SAFE_SPREAD = 0.025, 3.2


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
        from_data = bool(ROUTER_INITS[spec.router_init].texts)
        name, safe = ("router_spread", _SAFE_SPREAD) if from_data else ("router_std", _SAFE_STD)
        if not (spec.needs_float32_routing and getattr(spec, name) > safe):
            return ""
        return (
            f"{name}={getattr(spec, name):.3g} makes large logits, whose sigmoid scores are all 1 in float32:"
            " top-k then mixes copies"
        )
