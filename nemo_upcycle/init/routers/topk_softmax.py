"""Softmax after top-k, as in Mixtral and in the paper (arXiv 2412.09952): the chosen weights sum to one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.errors import SpecError
from nemo_upcycle.init.routers import RouterKind, register


if TYPE_CHECKING:
    from nemo_upcycle.spec import UpcycleSpec


@register
class TopkSoftmax(RouterKind):
    """A router with softmax after top-k. The model is exact for any router weights."""

    score, order = "softmax", "topk_softmax"
    pre_softmax = False

    def weight_sum(self, spec: UpcycleSpec) -> float:
        """Return 1."""
        return 1.0

    def check(self, spec: UpcycleSpec) -> None:
        """Refuse a top-1 router, which has no gradient."""
        if spec.top_k == 1:
            expected = (
                "2 or more with <router_order>=topk_softmax, because a single weight is always 1 and the router "
                "never learns"
            )
            raise SpecError(
                field="top_k",
                got=1,
                expected=expected,
                fix=(
                    "set <top_k>=2; with a dense parent, <router_order>=softmax_topk also works (exact with "
                    "<router_init>=zero)"
                ),
            )
