"""How sure is a difference between two trainings, over documents and over seeds; and how small a one could be seen?

Everything of this package that says "better", "worse" or "tie" asks here. Two errors make an interval: that of other
documents, and that of other seeds. Each has its own degrees of freedom, so each gets its own quantile before their
squares are added: of few seeds the interval is then rather too wide than too narrow. Where the spread of few seeds is
taken from others, it is assumed to be like theirs; benchmarks/results/coverage.md shows what that is worth.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache


#: Of every interval; half of it stands behind a ±.
CONFIDENCE = 0.95
#: With which a difference that matters is seen, where a page says what it could have seen.
POWER = 0.8
#: Bits per byte that do not matter: a thousandth of the 2 that a small model takes for a byte of English.
MARGIN = 2e-3
#: Bits per byte that rounding alone may make: 8e-5 were seen between a dense model and its copies in bfloat16.
ROUNDING = 2e-4
#: Fewer seeds say too little about their own spread: it is pooled with that of others.
LEAST_SEEDS = 5
#: Chance that a spread which is like the others' is taken for wider, and for narrower, which makes intervals small.
_WIDER, _NARROWER = 0.025, 0.0005
#: Sum of squares that rounding leaves of equal values.
_NOTHING = 1e-24
#: A number of seeds that nobody trains.
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Spread:
    """A standard deviation, or a standard error, and the degrees of freedom that it is known with.

    Args:
        value: the deviation; 0 where nothing differs.
        degrees: degrees of freedom, 1 or more.
    """

    value: float
    degrees: int

    def of_mean(self, count: int) -> Spread:
        """Give the error of a mean of so many values."""
        return Spread(self.value / math.sqrt(count), self.degrees)


def spread_of(values: Sequence[float]) -> Spread | None:
    """Estimate the spread of values; None for fewer than two.

    Example:
        >>> spread_of([1.0, 3.0]), spread_of([1.0])
        (Spread(value=1.4142135623730951, degrees=1), None)
    """
    return Spread(statistics.stdev(values), len(values) - 1) if len(values) > 1 else None


def pooled(spreads: Iterable[Spread]) -> Spread | None:
    """Pool spreads, each weighted by its degrees of freedom; None where there is none.

    Example:
        >>> pooled([Spread(3.0, 1), Spread(4.0, 1)])
        Spread(value=3.5355339059327378, degrees=2)
    """
    known = list(spreads)
    degrees = sum(spread.degrees for spread in known)
    if not degrees:
        return None
    return Spread(math.sqrt(sum(spread.value**2 * spread.degrees for spread in known) / degrees), degrees)


def seed_spread(values: Sequence[float], of_others: Spread | None) -> Spread | None:
    """Choose the spread from seed to seed that an interval is made of.

    It is the values' own of `LEAST_SEEDS` or more, of values that are all equal, and of values whose spread is wider
    than the others' by more than chance, or far narrower (F tests); else the others', or the own one where there is
    no other.

    Args:
        values: one number a seed.
        of_others: spread that is pooled over all that are like them.
    """
    own = spread_of(values)
    if own is None or of_others is None:
        return of_others if own is None else own
    is_own = len(values) >= LEAST_SEEDS or not own.value or _differ(own, of_others)
    return own if is_own else of_others


def _differ(one: Spread, other: Spread) -> bool:
    from scipy.stats import f

    above = f.sf((one.value / other.value) ** 2, one.degrees, other.degrees)
    return bool(above < _WIDER or 1 - above < _NARROWER)


def spread_without_seeds(values: Mapping[str, Mapping[int, float]]) -> Spread | None:
    """Give the spread from seed to seed of a model alone, without what a seed does to all models alike.

    The latter is taken out by least squares, with one effect a model and one a seed.

    Args:
        values: model -> seed -> value; seeds join the models.

    Returns:
        None where every model has a seed of its own, or one.

    Example:
        >>> spread_without_seeds({"a": {1: 1.0, 2: 2.0}, "b": {1: 1.5, 2: 2.6}}).degrees
        1
    """
    import numpy

    models, seeds = list(values), sorted({seed for of_model in values.values() for seed in of_model})
    rows = [(model, seed, value) for model, of_model in values.items() for seed, value in of_model.items()]
    design = numpy.zeros((len(rows), len(models) + len(seeds)))
    for row, (model, seed, _) in enumerate(rows):
        design[row, models.index(model)] = design[row, len(models) + seeds.index(seed)] = 1.0
    measured = numpy.array([value for *_, value in rows])
    effects, _, rank, _ = numpy.linalg.lstsq(design, measured, rcond=None)
    degrees, left = len(rows) - int(rank), float(((design @ effects - measured) ** 2).sum())
    return Spread(math.sqrt(left / degrees), degrees) if degrees and left > _NOTHING else None


def half_width(*errors: Spread | None, tests: int = 1) -> float:
    """Give half of an interval, of independent errors together.

    Args:
        errors: standard errors; None and 0 count for nothing.
        tests: number of intervals that are to hold all at once (Bonferroni).

    Example:
        >>> round(half_width(Spread(0.1, 1)), 3), round(half_width(Spread(0.1, 1), tests=2), 3)
        (1.271, 2.545)
    """
    tail = (1 - CONFIDENCE) / 2 / tests
    return math.hypot(*(t_quantile(1 - tail, error.degrees) * error.value for error in errors if error))


def error_of(stderr: float | None, observations: int) -> Spread | None:
    """Give a standard error the degrees of freedom of its observations; None if it is not known, or of one alone.

    Args:
        stderr: a standard error, as of a jackknife.
        observations: how many independent items, documents or subjects it was made of.
    """
    if stderr is None or not math.isfinite(stderr) or observations < 2:
        return None
    return Spread(stderr, observations - 1)


def with_interval(value: float, error: Spread | None) -> dict[str, float | None]:
    """Return a value and its interval, `low` to `high`; both are None without an error.

    Args:
        value: the middle of the interval.
        error: its standard error; None if it is not known.

    Example:
        >>> with_interval(1.0, None)
        {'value': 1.0, 'low': None, 'high': None}
    """
    if error is None:
        return {"value": value, "low": None, "high": None}
    half = half_width(error)
    return {"value": value, "low": value - half, "high": value + half}


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """Give the quantile of Student's t.

    Example:
        >>> round(t_quantile(0.975, 9), 4)
        2.2622
    """
    from scipy.stats import t

    return float(t.ppf(probability, degrees))


def resolvable(*errors: Spread | None, tests: int = 1) -> float:
    """Give the smallest difference that would have been seen with a probability of `POWER`.

    Args:
        errors: standard errors; None and 0 count for nothing.
        tests: number of intervals that hold all at once.
    """
    tail = (1 - CONFIDENCE) / 2 / tests
    seen = (
        (t_quantile(1 - tail, error.degrees) + t_quantile(POWER, error.degrees)) * error.value
        for error in errors
        if error
    )
    return math.hypot(*seen)


def seeds_to_resolve(difference: float, documents: Spread | None, seeds: Spread, tests: int = 1) -> int | None:
    """Count the seeds with which a difference would be seen; None where these documents cannot show it.

    Args:
        difference: the smallest one that matters.
        documents: standard error over documents, which more seeds leave as it is.
        seeds: spread from seed to seed.
        tests: number of intervals that hold all at once.
    """
    low, high = 1, _MOST_SEEDS
    if resolvable(documents, seeds.of_mean(high), tests=tests) > difference:
        return None
    while low < high:
        middle = (low + high) // 2
        if resolvable(documents, seeds.of_mean(middle), tests=tests) > difference:
            low = middle + 1
        else:
            high = middle
    return low


def verdict(difference: float, half: float, could_resolve: float, margin: float) -> str:
    """Name what an interval says of a difference in bits per byte, of which less is better.

    Args:
        difference: arm minus reference.
        half: half of its interval.
        could_resolve: the smallest difference that would have been seen.
        margin: difference that does not matter.

    Returns:
        `tie` where the whole interval lies within the margin and a difference as large as that would have been seen;
        `better` or `worse` where the interval leaves 0 out; else `not resolved`.
    """
    if abs(difference) + half <= margin and could_resolve <= margin:
        return "tie"
    if abs(difference) <= half:
        return "not resolved"
    return "better" if difference < 0 else "worse"
