"""The law that tells whether upcycling pays: loss after training, over the parent's tokens and the tokens that follow.

`interaction` is the form of arXiv 2502.03009 and 2510.06548: the exponent of the new tokens shrinks with the logarithm
of the parent's tokens. The other forms leave this out. `benchmarks/upcycling_law.py` fits the coefficients in
`conf/planning/upcycling_law.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nemo_upcycle.planning.hardware import read_data


@dataclass(frozen=True)
class Form:
    """A form of the law: a sum of terms, each times an amplitude, and the irreducible loss E.

    Args:
        exponents: names of what the terms depend on.
        terms: makes them of the exponents, the logarithm of the parent's tokens and that of the new ones: floats or
            arrays.
        amplitudes: names of the amplitudes, one a term.
    """

    exponents: tuple[str, ...]
    terms: Callable[[Any, Any, Any], list[Any]]
    amplitudes: tuple[str, ...] = ("A",)

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of all coefficients, in the order of a law's draws."""
        return (*self.amplitudes, *self.exponents, "E")


#: D1 are the parent's tokens, D2 the tokens that follow; `difference` is the difference from the dense loss.
FORMS = {
    # A * D1^-a * D2^(-b + c ln D1) + E
    "interaction": Form(
        ("a", "b", "c"), lambda t, ln1, ln2: [math.e ** (-t[0] * ln1 - t[1] * ln2 + t[2] * ln1 * ln2)]
    ),
    # A * D1^-a * D2^-b + E
    "product": Form(("a", "b"), lambda t, ln1, ln2: [math.e ** (-t[0] * ln1 - t[1] * ln2)]),
    # A * D1^-a + B * D2^-b + E
    "additive": Form(("a", "b"), lambda t, ln1, ln2: [math.e ** (-t[0] * ln1), math.e ** (-t[1] * ln2)], ("A", "B")),
    # A * (D2 + e^w D1)^-a + E
    "sum": Form(("a", "w"), lambda t, ln1, ln2: [(math.e ** (t[1] + ln1) + math.e**ln2) ** -t[0]]),
    # P ln D1 + Q ln D2 + E, of either sign
    "difference": Form((), lambda t, ln1, ln2: [ln1, ln2], ("P", "Q")),
    # A * D2^-a + E
    "power": Form(("a",), lambda t, ln1, ln2: [math.e ** (-t[0] * ln2)]),
}
#: The form of an upcycled model beside its parent trained on.
RELATIVE = "difference"
_NO_OTHERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class OptionLaw:
    """The law of one option.

    Args:
        form: one of `FORMS`.
        coefficients: values by the names of the form.
        parent_tokens, tokens, parameters: lowest and highest that it is fitted to (parameters: all of the parent);
            (0, 0) for the parent's tokens of an option without one.
        draws: coefficients of the bootstrap's draws, in the order of `Form.coefficients`.
        error: half of the 90 % interval of held-out differences to `dense`, in nats a token; of `dense`, of its loss.
        held_out: root of the mean squared error of each form on parents that were left out, in nats a token; of an
            upcycled model, of its difference to `dense`.
        intervals: 90 % interval of each coefficient.
        others: coefficients, by form, of those whose held-out error is not much larger than that of the chosen one:
            they may be right as well.
    """

    form: str
    coefficients: Mapping[str, float]
    parent_tokens: tuple[float, float]
    tokens: tuple[float, float]
    parameters: tuple[float, float]
    draws: Sequence[Sequence[float]] = ()
    error: float = 0.0
    held_out: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def loss(self, parent_tokens: float, tokens: float, draw: int | None = None, other: str | None = None) -> float:
        """Compute the loss in nats a token; the form `difference` gives its difference from the dense loss.

        Args:
            parent_tokens: tokens of the parent; unused of an option without one.
            tokens: tokens that follow.
            draw: number of a draw of the bootstrap; None: the fitted coefficients.
            other: name of a form in `others`, in place of the chosen one.
        """
        form, values = FORMS[other or self.form], dict(self.others[other] if other else self.coefficients)
        if draw is not None:
            values |= dict(zip(form.coefficients, self.draws[draw], strict=True))
        exponents = [values[name] for name in form.exponents]
        terms = form.terms(exponents, math.log(max(parent_tokens, 1.0)), math.log(tokens))
        return float(sum(values[name] * term for name, term in zip(form.amplitudes, terms, strict=True)) + values["E"])

    def beyond(self, parent_tokens: float, tokens: float, parameters: float) -> dict[str, float]:
        """Compute how far a point lies outside the fitted range, as ratios; 1 is inside."""
        ranges = {"tokens": (tokens, self.tokens), "parameters": (parameters, self.parameters)}
        if self.parent_tokens[1]:
            ranges = {"parent's tokens": (parent_tokens, self.parent_tokens), **ranges}
        return {name: max(1.0, value / high, low / value) for name, (value, (low, high)) in ranges.items()}


@dataclass(frozen=True)
class Band:
    """A difference of losses in nats a token, and its 90 % band; None where a law has none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_resolved(self) -> bool:
        """Whether the band excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Law:
    """The laws of the options, of one set of trainings.

    Args:
        about: what was trained, for people.
        source: place of the points.
        options: option -> its law: `dense`, `dense_from_nothing`, and for a shape such as `e8t2`, `upcycled_e8t2` and
            `moe_from_nothing_e8t2`.
        left_out: option -> reason why it has no law although there are trainings of it.
    """

    about: str
    source: str
    options: Mapping[str, OptionLaw]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def loss(
        self,
        option: str,
        parent_tokens: float,
        tokens: float,
        draw: int | None = None,
        others: Mapping[str, str] = _NO_OTHERS,
    ) -> float:
        """Compute an option's loss in nats a token.

        Args:
            option: name of the option.
            parent_tokens: tokens of the parent.
            tokens: tokens that follow.
            draw: number of a draw of the bootstrap; None: the fitted coefficients.
            others: forms, by option, from its `others`, in place of the chosen one.
        """
        form = others.get(option)
        loss = self.options[option].loss(parent_tokens, tokens, draw, form)
        if (form or self.options[option].form) == RELATIVE:
            loss += self.loss("dense", parent_tokens, tokens, draw, others)
        return loss

    def difference(self, one: str, tokens: float, other: str, other_tokens: float, parent_tokens: float) -> Band:
        """Compute the loss of one option less that of another.

        The band joins the bootstrap over seeds, whose draws are the same for both, and the error on parents that were
        left out of the fit; and it reaches around what each form says that predicted these about as well.

        Args:
            one, other: names of options.
            tokens, other_tokens: what each is trained on.
            parent_tokens: tokens of the parent.
        """

        def value(draw: int | None, others: Mapping[str, str] = _NO_OTHERS) -> float:
            first = self.loss(one, parent_tokens, tokens, draw, others)
            return first - self.loss(other, parent_tokens, other_tokens, draw, others)

        center = value(None)
        if not (count := min(len(self.options[name].draws) for name in (one, other))):
            return Band(center)
        values = sorted(value(draw) for draw in range(count))
        errors = [self.options[name].error for name in {one, other} if name != "dense"] or [0.0]
        down, up = center - quantile(values, 0.05), quantile(values, 0.95) - center
        by_form = [
            value(None, {name: form})
            for name in dict.fromkeys((one, other, "dense"))
            for form in self.options[name].others
        ]
        low, high = min([center, *by_form]), max([center, *by_form])
        return Band(center, low - math.hypot(max(down, 0.0), *errors), high + math.hypot(max(up, 0.0), *errors))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Find the value below which a share of ordered values lies, between two of them by a straight line."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def fitted_law() -> Law | None:
    """Read the law that was fitted to this project's own grid; None where there is none yet."""
    try:
        values = read_data("upcycling_law.yaml")
    except FileNotFoundError:
        return None
    return law_of(values)


def law_of(values: Mapping[str, Any]) -> Law:
    """Make a law of the plain values of its YAML file."""
    options = {name: OptionLaw(**option) for name, option in values["options"].items()}
    return Law(values["about"], values["source"], options, values.get("left_out", {}))


def shape_name(num_experts: int, top_k: int, granularity: int) -> str:
    """Name the shape of an MoE.

    Example:
        >>> shape_name(8, 2, 1), shape_name(16, 4, 2)
        ('e8t2', 'e16t4g2')
    """
    return f"e{num_experts}t{top_k}" + (f"g{granularity}" if granularity > 1 else "")
