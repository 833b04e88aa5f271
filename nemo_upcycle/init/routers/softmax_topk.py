"""Softmax before top-k, as in Switch Transformers (arXiv 2101.03961): the chosen weights sum to less than one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import RouterKind, register


if TYPE_CHECKING:
    from nemo_upcycle.spec import UpcycleSpec


@register
class SoftmaxTopk(RouterKind):
    """A router with softmax before top-k. The model is exact if the router is zero or every expert is chosen."""

    score, order = "softmax", "softmax_topk"
    pre_softmax = True

    def weight_sum(self, spec: UpcycleSpec) -> float:
        """Return the sum of the chosen weights when all weights are equal."""
        return spec.top_k / spec.num_experts
