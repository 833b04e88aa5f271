"""The routers: kinds (score and order of top-k) and initialisations of the weights, one file each.

A kind is a class, and an initialisation is a function. Every module in this folder is imported, so a new kind or
initialisation is a new file here. A kind or initialisation of another package registers itself when its module is
imported. No module imports torch at the top, because the planner needs only the names.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_upcycle.errors import SpecError
from nemo_upcycle.spec import ROUTER_INITS, ROUTER_KINDS, ROUTER_ORDERS, ROUTER_SCORES, RouterInit, RouterKind


if TYPE_CHECKING:
    from nemo_upcycle.spec import Rows, UpcycleSpec


__all__ = ["RouterKind", "inexact_in_float32", "register", "router_init"]

_Kind = TypeVar("_Kind", bound="type[RouterKind]")


def register(kind: _Kind) -> _Kind:
    """Register a router kind by its score and order. Use this function as a class decorator.

    Raises:
        SpecError: another kind has the same score and order.
    """
    made = kind()
    _add(ROUTER_KINDS, (made.score, made.order), made)
    for name, names in ((made.score, ROUTER_SCORES), (made.order, ROUTER_ORDERS)):
        names += [] if name in names else [name]
    return kind


def router_init(*, from_data: bool = False, always_zero: bool = False) -> Callable[[Rows], Rows]:
    """Register a function as a router initialisation under the function's name.

    The function returns the rows of a layer's router, [C, D] in float64, one for each copy of the network. It must
    draw each row from the row's own generator, and a row must not depend on how many copies there are.

    Args:
        from_data: whether the function reads the rows from the spec's calibration file; otherwise it draws them.
        always_zero: whether all weights are zero for every spec.

    Raises:
        SpecError: the name is taken.

    Example:
        >>> @router_init()  # doctest: +SKIP
        ... def ones(spec, layer, hidden_size, generators):
        ...     return torch.ones(len(generators), hidden_size, dtype=torch.float64) * spec.router_std
    """

    def register_rows(rows: Rows) -> Rows:
        _add(ROUTER_INITS, rows.__name__, RouterInit(rows.__name__, rows, from_data, always_zero))
        return rows

    return register_rows


#: If a reason affects at most this share of a layer's tokens, it is not returned, because most texts contain no
#: affected token.
_RARE = 1e-5


def inexact_in_float32(spec: UpcycleSpec, hidden_size: int) -> tuple[str, ...]:
    """Return why a model that is exact in real numbers is inexact in float32; empty if only rounding differs.

    A token has one logit for each of the C copies of the network. The estimate assumes that the logits are normally
    distributed with a standard deviation of s. If the router's weights are independent and a token has a root mean
    square of 1, s = router_std sqrt(hidden_size). If the parent's norm makes tokens n times as large, the effect is
    the same as with an n times larger router_std. A router from data has s = router_spread. A reason is returned if it
    affects more than one token in 100,000 of a layer:

    - Sigmoid scores are so small that the 1e-20 added to their sum matters. This happens if all logits are below
      `least_logit`, with probability Phi(least_logit / s)^C.
    - With granularity, the last of the c chosen copies has the same float32 score as the next copy, and top-k takes
      parts of both. This happens if the two logits differ by less than `RouterKind.spacing`. At z standard deviations
      the two logits are next to each other with density C! / ((c - 1)! (C - c - 1)!) (1 - Phi)^(c - 1)
      Phi^(C - c - 1) phi^2 / s. The probability is the sum over all z of this density times the spacing. Small logits
      therefore tie, and so do large logits with sigmoid scores. Hugging Face's classes choose by score, so they are
      affected. Megatron's softmax after top-k chooses by the logits, and small logits do not tie. A model with this
      router is therefore exact in Megatron, but its export is not.

    Args:
        spec: how a dense parent is upcycled.
        hidden_size: hidden size of the parent.

    Example:
        >>> inexact_in_float32(UpcycleSpec(num_experts=8, top_k=4, granularity=2, router_std=0.02), 4096)
        ()
    """
    router, kind, copies, chosen = ROUTER_INITS[spec.router_init], spec.router_kind, spec.copies, spec.top_k
    if router.is_zero(spec):
        return ()
    name = "router_spread" if router.from_data else "router_std"
    deviation = getattr(spec, name) * (1.0 if router.from_data else math.sqrt(hidden_size))
    cause, reasons = f"with {name}={getattr(spec, name):.3g}", list[str]()
    if chosen > 1 and _below(kind.least_logit / deviation) ** copies > _RARE:
        reasons.append(f"{cause} float32 loses the sum of {kind.score} scores if all logits are far below zero")
    if spec.needs_float32_routing:
        chosen //= spec.granularity
        ways = math.lgamma(copies + 1) - math.lgamma(chosen) - math.lgamma(copies - chosen)
        tied = 0.0
        for step in range(-160, 161):
            place = step / 20
            others = (chosen - 1) * math.log(_below(-place)) + (copies - chosen - 1) * math.log(_below(place))
            both = math.exp(ways + others - place**2) / (2 * math.pi * deviation)
            tied += both * kind.spacing(place * deviation) / 20
        if tied > _RARE:
            reasons.append(
                f"{cause} two copies can have the same {kind.score} score in float32, and top-k then mixes them"
            )
    return tuple(reasons)


def _below(place: float) -> float:
    """Return the probability that a normal number is below `place` standard deviations."""
    return math.erfc(-place / math.sqrt(2.0)) / 2.0


def _add(table: dict[Any, Any], key: Any, made: object) -> None:
    if key in table:
        raise SpecError(f"Router {key}", kind="refused", got="exists already", fix="choose another name")
    table[key] = made


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
