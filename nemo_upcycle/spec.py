"""What to build from a dense model: `UpcycleSpec`, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nemo_upcycle.errors import SpecError, problem, unknown


METHODS = ("copy",)
ROUTER_INITS = ("normal", "uniform", "zero")
ROUTER_ORDERS = ("topk_softmax", "softmax_topk")
OUTPUT_SCALES = ("exact", "none")


@dataclass(frozen=True, kw_only=True)
class UpcycleSpec:
    """How a dense model becomes a Mixture-of-Experts model; by default as in the paper (arXiv 2412.09952, section 2).

    Args:
        num_experts: experts in every layer.
        top_k: experts that a token passes through.
        method: `copy` makes every expert an exact copy of the dense feed-forward network.
        router_init: `normal` (mean 0), `uniform` (mean 0) or `zero`.
        router_std: standard deviation of the router's weights; the paper gives none, 0.02 is the family's usual one.
        router_order: `topk_softmax` (Mixtral type: the weights of the chosen experts sum to one) or `softmax_topk`
            (ST type: they do not; `moe_router_pre_softmax` in Megatron).
        output_scale: `exact` scales the experts' down projection so that identical experts compute the dense function
            (1 for `topk_softmax`, num_experts / top_k for `softmax_topk`, exact there only with a zero router);
            `none` leaves the weights as they are, as the paper does.
        seed: of the router's random numbers. They depend on seed, layer and expert alone, never on the layout.

    Raises:
        SpecError: a value is out of range or unknown.

    Example:
        >>> UpcycleSpec(num_experts=8, top_k=2).down_scale
        1.0
    """

    num_experts: int = 8
    top_k: int = 2
    method: str = "copy"
    router_init: str = "normal"
    router_std: float = 0.02
    router_order: str = "topk_softmax"
    output_scale: str = "exact"
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, valid in (
            ("method", METHODS),
            ("router_init", ROUTER_INITS),
            ("router_order", ROUTER_ORDERS),
            ("output_scale", OUTPUT_SCALES),
        ):
            if getattr(self, name) not in valid:
                raise SpecError(unknown(name, str(getattr(self, name)), valid))
        self._check_whole("num_experts", self.num_experts, 2, None)
        self._check_whole("top_k", self.top_k, 1, self.num_experts)
        self._check_whole("seed", self.seed, 0, 2**63 - 1)
        if not self.router_std >= 0:
            raise SpecError(problem("router_std", got=self.router_std, expected="0 or more", fix="use 0.02"))

    @staticmethod
    def _check_whole(name: str, value: object, low: int, high: int | None) -> None:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high):
            return
        limit = f"{low} to {high}" if high is not None else f"{low} or more"
        if name == "top_k":
            limit += " (num_experts)"
        raise SpecError(
            problem(name, got=value, expected=f"a whole number, {limit}", fix=f"set {name} within the range")
        )

    @property
    def down_scale(self) -> float:
        """Factor on every expert's down projection.

        Only this matrix is scaled: the network is linear in it, so the factor acts on the output exactly, whatever the
        activation. With identical experts of output f(x) and combine weights p_i over the chosen k, the layer gives
        down_scale * sum(p_i) * f(x). `topk_softmax` has sum(p_i) = 1. `softmax_topk` with a zero router has k / E.
        """
        if self.output_scale == "exact" and self.router_order == "softmax_topk":
            return self.num_experts / self.top_k
        return 1.0

    @property
    def is_exact(self) -> bool:
        """Whether the upcycled model computes the dense function at step 0, up to rounding."""
        zero_router = self.router_init == "zero" or self.router_std == 0
        if self.router_order == "topk_softmax":
            return True
        return (self.output_scale == "exact" and zero_router) or self.top_k == self.num_experts

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for receipts."""
        return asdict(self)
