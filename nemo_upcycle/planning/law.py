"""The law of what pays: the loss after training, as a function of the parent's tokens and of those that follow.

`interaction` is the form of arXiv 2502.03009 and 2510.06548: the exponent of the new tokens shrinks with the logarithm
of the parent's. The others are without that. Coefficients are data: published ones in
`conf/planning/upcycling_points.yaml`, fitted ones in `conf/planning/upcycling_law.yaml` or of a user's own grid.
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
        terms: of the exponents, the logarithm of the parent's tokens and that of the new ones: floats or arrays.
        amplitudes: their names, one a term.
        text: the formula.
    """

    exponents: tuple[str, ...]
    terms: Callable[[Any, Any, Any], list[Any]]
    amplitudes: tuple[str, ...]
    text: str

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of all coefficients, in the order of a law's draws."""
        return (*self.amplitudes, *self.exponents, "E")


#: ln D1 is the logarithm of the parent's tokens, ln D2 that of the tokens after it.
FORMS = {
    "interaction": Form(
        ("a", "b", "c"),
        lambda t, ln1, ln2: [math.e ** (-t[0] * ln1 - t[1] * ln2 + t[2] * ln1 * ln2)],
        ("A",),
        "A * D1^-a * D2^(-b + c ln D1) + E",
    ),
    "product": Form(
        ("a", "b"), lambda t, ln1, ln2: [math.e ** (-t[0] * ln1 - t[1] * ln2)], ("A",), "A * D1^-a * D2^-b + E"
    ),
    "additive": Form(
        ("a", "b"),
        lambda t, ln1, ln2: [math.e ** (-t[0] * ln1), math.e ** (-t[1] * ln2)],
        ("A", "B"),
        "A * D1^-a + B * D2^-b + E",
    ),
    "sum": Form(
        ("a", "w"),
        lambda t, ln1, ln2: [(math.e ** (t[1] + ln1) + math.e**ln2) ** -t[0]],
        ("A",),
        "A * (D2 + e^w D1)^-a + E",
    ),
    "difference": Form((), lambda t, ln1, ln2: [ln1, ln2], ("P", "Q"), "loss of dense + P ln D1 + Q ln D2 + E"),
    "power": Form(("a",), lambda t, ln1, ln2: [math.e ** (-t[0] * ln2)], ("A",), "A * D2^-a + E"),
}
#: Forms of an option that has a parent, and of one that begins from nothing.
WITH_PARENT, FROM_NOTHING = ("interaction", "product", "additive", "sum"), ("power",)
#: The form of an upcycled model beside its parent trained on: its terms may have either sign.
RELATIVE = "difference"
#: The chosen forms, and no other.
NO_OTHERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class OptionLaw:
    """The law of one option.

    Args:
        form: one of `FORMS`.
        coefficients: by the names of the form, and `E`; of a law with a term of the model's size also `size` and
            `size_exponent`: size * N^-size_exponent, N the parent's parameters.
        parent_tokens, tokens, parameters: lowest and highest that it is fitted to (parameters: all of the parent);
            (0, 0) for the parent's tokens of an option without one.
        draws: coefficients of the bootstrap's draws, in the order of `Form.coefficients`; none of a published law.
        error: half of the 90 % interval of held-out differences to `dense`, in nats a token; of `dense`, of its loss.
        held_out: root of the mean squared error of each form on parents that were left out, in nats a token; of an
            upcycled model, of its difference to `dense`.
        intervals: 90 % interval of each coefficient.
        others: by form, the coefficients of those whose held-out error is not much larger than that of the chosen one:
            they may be right as well.
    """

    form: str
    coefficients: Mapping[str, float]
    parent_tokens: tuple[float, float]
    tokens: tuple[float, float]
    parameters: tuple[float, float]
    draws: Sequence[Sequence[float]] = ()
    error: float = 0.0
    held_out: Mapping[str, float] | None = None
    intervals: Mapping[str, Sequence[float]] | None = None
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def loss(
        self, parent_tokens: float, tokens: float, parameters: float, draw: int | None = None, other: str | None = None
    ) -> float:
        """Return the loss in nats a token; of the form `difference` only what is added to that of dense.

        Args:
            parent_tokens: that the parent was trained on; unused of an option without a parent.
            tokens: that follow.
            parameters: of the dense parent.
            draw: number of a draw of the bootstrap; None: the fitted coefficients.
            other: one of `others`, in place of the chosen form.
        """
        form, values = FORMS[other or self.form], dict(self.others[other] if other else self.coefficients)
        if draw is not None:
            values |= dict(zip(form.coefficients, self.draws[draw], strict=True))
        exponents = [values[name] for name in form.exponents]
        terms = form.terms(exponents, math.log(max(parent_tokens, 1.0)), math.log(tokens))
        loss = sum(values[name] * term for name, term in zip(form.amplitudes, terms, strict=True)) + values["E"]
        if "size" in values:
            loss += values["size"] * parameters ** -values["size_exponent"]
        return float(loss)

    def beyond(self, parent_tokens: float, tokens: float, parameters: float) -> dict[str, float]:
        """Return how far a point lies outside of what the law is fitted to, as ratios; 1 is inside."""
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
        about: what was trained.
        source: where the points are.
        options: by name: `dense`, `dense_from_nothing`, and of a shape such as `e8t2` `upcycled_e8t2` and
            `moe_from_nothing_e8t2`.
        fitted: whether it was fitted here; else it is published.
        left_out: by option, why it has no law though some trainings of it are there.
    """

    about: str
    source: str
    options: Mapping[str, OptionLaw]
    fitted: bool = True
    left_out: Mapping[str, str] = field(default_factory=dict)

    def loss(
        self,
        option: str,
        parent_tokens: float,
        tokens: float,
        parameters: float,
        draw: int | None = None,
        others: Mapping[str, str] = NO_OTHERS,
    ) -> float:
        """Return an option's loss in nats a token.

        A published law has no continued dense training: it is taken as one training on the tokens of both.

        Args:
            option: its name.
            parent_tokens: that the parent was trained on.
            tokens: that follow.
            parameters: of the dense parent.
            draw: number of a draw of the bootstrap; None: the fitted coefficients.
            others: by option, one of its `others` in place of the chosen form.
        """
        if option == "dense" and option not in self.options:
            return self.options["dense_from_nothing"].loss(0, parent_tokens + tokens, parameters, draw)
        form = others.get(option)
        loss = self.options[option].loss(parent_tokens, tokens, parameters, draw, form)
        if (form or self.options[option].form) == RELATIVE:
            loss += self.loss("dense", parent_tokens, tokens, parameters, draw, others)
        return loss

    @property
    def has_size(self) -> bool:
        """Whether the model's size is a term of it."""
        return all("size" in option.coefficients for option in self.options.values())

    def has(self, option: str) -> bool:
        """Return whether the law has an option."""
        return option in self.options or (option == "dense" and "dense_from_nothing" in self.options)

    def difference(
        self, one: str, tokens: float, other: str, other_tokens: float, parent_tokens: float, parameters: float
    ) -> Band:
        """Return the loss of one option less that of another.

        The band joins the bootstrap over seeds, whose draws are the same for both, and the error on parents that were
        left out of the fit; and it reaches around what each form says that predicted these about as well.

        Args:
            one, other: names of options.
            tokens, other_tokens: what each is trained on.
            parent_tokens: that the parent was trained on.
            parameters: of the dense parent.
        """

        def value(draw: int | None, others: Mapping[str, str] = NO_OTHERS) -> float:
            first = self.loss(one, parent_tokens, tokens, parameters, draw, others)
            return first - self.loss(other, parent_tokens, other_tokens, parameters, draw, others)

        center = value(None)
        count = min(len(self.options[name].draws) if name in self.options else 0 for name in (one, other))
        if not count:
            return Band(center)
        values = sorted(value(draw) for draw in range(count))
        errors = [self.options[name].error for name in {one, other} if name != "dense"] or [0.0]
        down, up = center - quantile(values, 0.05), quantile(values, 0.95) - center
        by_form = [
            value(None, {name: form})
            for name in dict.fromkeys((one, other, "dense"))
            if name in self.options
            for form in self.options[name].others
        ]
        low, high = min([center, *by_form]), max([center, *by_form])
        return Band(center, low - math.hypot(max(down, 0.0), *errors), high + math.hypot(max(up, 0.0), *errors))

    def beyond(self, option: str, parent_tokens: float, tokens: float, parameters: float) -> dict[str, float]:
        """Return how far a point lies outside of the fitted range, as ratios; 1 is inside."""
        if option == "dense" and option not in self.options:
            return self.options["dense_from_nothing"].beyond(0, parent_tokens + tokens, parameters)
        return self.options[option].beyond(parent_tokens, tokens, parameters)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which a share of ordered values lies, between two of them by a straight line."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def law_of(values: Mapping[str, Any], *, fitted: bool) -> Law:
    """Return a law from the plain values of its YAML file."""
    options = {name: OptionLaw(**option) for name, option in values["options"].items()}
    return Law(values["about"], values["source"], options, fitted, values.get("left_out", {}))


def published_law() -> Law:
    """Return the law of arXiv 2502.03009."""
    return law_of(read_data("upcycling_points.yaml")["law"], fitted=False)


def published_outcomes() -> list[dict[str, Any]]:
    """Return what others measured of parents that were trained long; the file explains the keys."""
    return list(read_data("upcycling_points.yaml")["outcomes"])


def published_checks() -> list[dict[str, Any]]:
    """Return the differences that others measured, and what the published law says of them, in nats a token."""
    law, checks = published_law(), []
    for outcome in published_outcomes():
        sizes = (outcome["parent_tokens"], outcome["parameters"])
        if losses := outcome.get("losses"):
            what, pair, tokens = "upcycled less dense", ("upcycled_e8t2", "dense"), outcome["tokens"]
            measured = losses["moe"] - losses["dense"]
        elif tokens := outcome.get("level_after"):
            what, pair, measured = "new less upcycled", ("moe_from_nothing_e8t2", "upcycled_e8t2"), 0.0
        else:
            continue
        predicted = law.difference(pair[0], tokens, pair[1], tokens, *sizes).value
        checks.append({"source": outcome["source"], "what": what, "measured": measured, "predicted": predicted})
    return checks


def fitted_law() -> Law | None:
    """Return the law that was fitted to this project's own grid; None where there is none yet."""
    try:
        values = read_data("upcycling_law.yaml")
    except FileNotFoundError:
        return None
    return law_of(values, fitted=True)


def shape_name(num_experts: int, top_k: int, granularity: int) -> str:
    """Return the short name of an MoE's shape.

    Example:
        >>> shape_name(8, 2, 1), shape_name(16, 4, 2)
        ('e8t2', 'e16t4g2')
    """
    return f"e{num_experts}t{top_k}" + (f"g{granularity}" if granularity > 1 else "")
