"""Should a dense model be upcycled: what each option costs, what the laws expect of it, and whether that decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nemo_upcycle.planning.law import Band, Law, shape_name
from nemo_upcycle.planning.memory import GIB
from nemo_upcycle.planning.search import Plan, PlanRequest, search
from nemo_upcycle.spec import UpcycleSpec


#: Up to this ratio beyond the fitted range, of tokens or of parameters, a law decides. A choice: parents that are left
#: out of a fit lie up to a factor 2 beyond the others, and a fit to one model has no term for its size.
MOST_BEYOND = 2.0
BYTES_SERVED = 2  # of a parameter, in BF16


class Candidate(Protocol):
    """What a law is asked about: an `Option`, or something to do without a plan."""

    @property
    def name(self) -> str:
        """For a table."""

    @property
    def key(self) -> str:
        """Its name in a `Law`."""

    @property
    def tokens(self) -> float:
        """Tokens that are trained on."""

    @property
    def fits(self) -> bool:
        """Whether the GPUs hold it."""


@dataclass(frozen=True)
class Option:
    """Something to do with the dense model.

    Args:
        name: for a table.
        key: its name in a `Law`.
        plan: the fastest layout that fits, with the tokens of the option.
    """

    name: str
    key: str
    plan: Plan

    @property
    def shape(self) -> str:
        """Of an MoE: `e8t2`."""
        return self.key.rpartition("_")[2]

    @property
    def fits(self) -> bool:
        """Whether the GPUs hold it."""
        return self.plan.verdict != "no"

    @property
    def tokens(self) -> float:
        """Tokens that are trained on."""
        return self.plan.request.tokens


@dataclass(frozen=True)
class Expectation:
    """What a law says of an option.

    Args:
        difference: of its loss to going on dense, in nats a token; of dense itself 0. None: the model has another size
            than the law's, which has no term for it.
        beyond: ratios to the fitted range, by what is beyond it; 1 is inside.
        above_parent: whether the law has the upcycled model above its own parent, where its training begins: there the
            law does not hold.
    """

    difference: Band | None
    beyond: dict[str, float]
    above_parent: bool = False

    @property
    def is_near(self) -> bool:
        """Whether the law may decide here."""
        return max(self.beyond.values()) <= MOST_BEYOND


@dataclass(frozen=True)
class Verdict:
    """Whether a law decides between options.

    Args:
        best: the name of the best option; None: not decided.
        leans_to: the name of the option with the lowest expected loss; None: the law does not hold there.
        why: a sentence.
    """

    best: str | None
    leans_to: str | None
    why: str


@dataclass(frozen=True)
class DenseParent:
    """The dense model that a law is asked about.

    Args:
        tokens: that it was trained on.
        parameters: all of them.
    """

    tokens: float
    parameters: float

    def expect(self, law: Law, option: Candidate, dense: Candidate) -> Expectation | None:
        """Return what a law says of an option; None where it has none of this shape, or the option does not fit."""
        if not (law.has(option.key) and option.fits and dense.fits):
            return None
        sizes = (self.tokens, self.parameters)
        difference: Band | None = law.difference(option.key, option.tokens, "dense", dense.tokens, *sizes)
        beyond = law.beyond(option.key, self.tokens, option.tokens, self.parameters)
        if beyond["parameters"] > MOST_BEYOND and not law.has_size:
            return Expectation(None, beyond)
        above = False
        if option.key.startswith("upcycled") and "dense_from_nothing" in law.options and max(beyond.values()) > 1:
            parent = law.loss("dense_from_nothing", 0, self.tokens, self.parameters)
            above = law.loss(option.key, self.tokens, option.tokens, self.parameters) > parent
        return Expectation(difference, beyond, above)

    def decide(self, law: Law, options: Sequence[Candidate]) -> Verdict:
        """Return whether a law decides between the options that it has."""
        known = {option.name: (option, self.expect(law, option, options[0])) for option in options}
        expected = {name: (option, found) for name, (option, found) in known.items() if found}
        if not any(option.key.startswith("upcycled") for option, _ in expected.values()):
            return Verdict(None, None, "it has no upcycled model of these shapes that fits")
        if broken := [name for name, (_, found) in expected.items() if found.above_parent]:
            why = f"it has '{broken[0]}' above the parent that its training begins from: it does not hold so far out"
            return Verdict(None, None, why)
        differences = {name: found.difference.value for name, (_, found) in expected.items() if found.difference}
        best = min(differences, key=lambda name: differences[name]) if differences else None
        main = [found for option, found in expected.values() if "from_nothing" not in option.key]
        ratio, what = max((ratio, what) for found in main for what, ratio in found.beyond.items())
        if best is None or ratio > MOST_BEYOND:
            limit = f"it decides up to {MOST_BEYOND:g} times"
            return Verdict(None, best, f"the {what} are {ratio_text(ratio)} times beyond its range; {limit}")
        near = {name: option for name, (option, found) in expected.items() if found.is_near}
        best = min(near, key=lambda name: differences[name])
        for name in [name for name in near if name != best]:
            band = self._between(law, near[best], near[name])
            if band.low is None:
                return Verdict(None, best, "it has no intervals")
            if not band.is_resolved:
                return Verdict(None, best, f"the bands of '{best}' and '{name}' overlap")
        left_out = "".join(f"; '{name}' lies too far out to count" for name in expected if name not in near)
        return Verdict(best, best, f"the band of '{best}' is apart from all others{left_out}")

    def _between(self, law: Law, one: Candidate, other: Candidate) -> Band:
        return law.difference(one.key, one.tokens, other.key, other.tokens, self.tokens, self.parameters)


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        request: of the dense model; its tokens count where `hours` is None.
        parent_tokens: that the model was trained on.
        hours: of the GPUs, for each option; None: all train on the same tokens.
    """

    request: PlanRequest
    parent_tokens: float
    hours: float | None = None

    @property
    def parameters(self) -> int:
        """Of the dense model."""
        return self.request.arch.total_params

    @property
    def parent(self) -> DenseParent:
        """The dense model, as a law is asked about it."""
        return DenseParent(self.parent_tokens, self.parameters)

    def option(self, name: str, key: str, spec: UpcycleSpec | None = None) -> Option:
        """Return an option with its fastest layout, and the tokens that the hours allow.

        Raises:
            SpecError: no layout obeys the rules, or the spec does not fit the model.
        """
        request = self.request
        if spec:
            request = replace(request, arch=request.arch.upcycled(spec))
        plan = search(request, 1)[0]
        if self.hours is not None:
            tokens = plan.tokens_per_s_per_gpu * request.gpus * 3600 * self.hours
            plan = replace(plan, request=replace(plan.request, tokens=tokens))
        return Option(name, key, plan)

    def options(self, specs: Sequence[UpcycleSpec]) -> list[Option]:
        """Return going on dense, upcycling to each spec, and an MoE of each shape from nothing, at the same speed."""
        found = [self.option("dense", "dense")]
        for spec in specs:
            shape = shape_name(spec.num_experts, spec.top_k, spec.granularity)
            found.append(self.option(f"upcycle {shape}", f"upcycled_{shape}", spec))
        new = [Option(f"new {one.shape}", f"moe_from_nothing_{one.shape}", one.plan) for one in found[1:]]
        return [*found, *new]


def ratio_text(ratio: float) -> str:
    """Return a ratio for people: 8.0, or 40,761."""
    return f"{ratio:,.1f}" if ratio < 100 else f"{ratio:,.0f}"


def option_values(option: Option) -> dict[str, Any]:
    """Return what an option costs, for machines."""
    plan, arch = option.plan, option.plan.request.arch
    return {
        "fits": plan.verdict,
        "layout": plan.layout.sizes,
        "tokens": option.tokens,
        "hours": round(plan.hours, 2),
        "gpu_hours": round(plan.gpu_hours, 1),
        "cost": None if plan.cost is None else round(plan.cost, 2),
        "memory_gib": round(plan.memory.total / GIB, 1),
        "active_parameters": arch.active_params,
        "total_parameters": arch.total_params,
        "served_bytes": BYTES_SERVED * arch.total_params,
    }


def expectation_values(found: Expectation | None) -> dict[str, Any] | None:
    """Return what a law says of an option, for machines."""
    if found is None:
        return None
    band = found.difference
    limits = [limit for limit in (band.low, band.high) if limit is not None] if band else []
    return {
        "loss_difference": None if band is None else round(band.value, 5),
        "band_90": [round(limit, 5) for limit in limits] or None,
        "near": found.is_near,
        "beyond": {what: round(ratio, 3) for what, ratio in found.beyond.items()},
        "above_parent": found.above_parent,
    }
