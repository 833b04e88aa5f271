"""How certain is a difference between two trainings? And how small a difference can the trainings show?

Every "better", "worse" and "tie" of this package comes from here. The width of an interval comes from two errors: the
error over documents and the error over seeds. Each error has its own degrees of freedom, so each is multiplied by its
own quantile before the squares are added. With few seeds, the interval is then too wide rather than too narrow. If an
arm has few seeds, it is assumed that its spread is like the spread of other arms. benchmarks/results/coverage.md shows
how well this assumption holds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache


#: Confidence of every interval. The number after a ± is half of an interval.
CONFIDENCE = 0.95
#: A page says that a grid detects a difference if the grid detects it with this probability.
POWER = 0.8
#: Difference in bits per byte that is too small to matter. A small model needs 2 bits for a byte of English.
MARGIN = 2e-3
#: Difference in bits per byte that rounding may cause. Between a dense model and its bfloat16 copies, it was 8e-5.
ROUNDING = 2e-4
#: With fewer seeds than this, an arm's own spread is too uncertain, so the pooled spread of other arms is used.
LEAST_SEEDS = 5
#: Probabilities of wrongly judging a spread to be wider, or narrower, than the spread of other arms. The second
#: probability is lower, because a narrower spread makes intervals small.
_WIDER, _NARROWER = 0.025, 0.0005
#: Largest sum of squares that rounding causes for equal values.
_NOTHING = 1e-24
#: Upper limit for the number of seeds; nobody trains so many.
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Spread:
    """A standard deviation or a standard error, with its degrees of freedom.

    Args:
        value: the deviation; 0 if nothing differs.
        degrees: degrees of freedom, 1 or more.
    """

    value: float
    degrees: int

    def of_mean(self, count: int) -> Spread:
        """Return the error of the mean of `count` values."""
        return Spread(self.value / math.sqrt(count), self.degrees)


def spread_of(values: Sequence[float]) -> Spread | None:
    """Estimate the spread of values; return None for fewer than two values.

    Example:
        >>> spread_of([1.0, 3.0]), spread_of([1.0])
        (Spread(value=1.4142135623730951, degrees=1), None)
    """
    return Spread(statistics.stdev(values), len(values) - 1) if len(values) > 1 else None


def pooled(spreads: Iterable[Spread]) -> Spread | None:
    """Pool spreads, each weighted by its degrees of freedom; None if there are no spreads.

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
    """Choose the spread from seed to seed for an interval.

    Use the values' own spread if there are at least `LEAST_SEEDS` values, if all values are equal, or if their spread
    is significantly wider or far narrower than the spread of other arms (F tests). Also use it if there are no other
    arms. Otherwise use the spread of other arms.

    Args:
        values: one number per seed.
        of_others: spread that is pooled over all comparable arms.
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
    """Return a model's own spread from seed to seed, without the effect of a seed that all models share.

    Least squares remove the shared effect, with one effect per model and one per seed.

    Args:
        values: model -> seed -> value; shared seeds connect the models.

    Returns:
        The spread; None if the models share too few seeds, or if nothing but rounding is left.

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
    """Return half the width of the interval that several independent errors make together.

    Args:
        errors: standard errors; an error that is None or 0 adds nothing.
        tests: number of intervals that must hold all at once (Bonferroni).

    Example:
        >>> round(half_width(Spread(0.1, 1)), 3), round(half_width(Spread(0.1, 1), tests=2), 3)
        (1.271, 2.545)
    """
    tail = (1 - CONFIDENCE) / 2 / tests
    return math.hypot(*(t_quantile(1 - tail, error.degrees) * error.value for error in errors if error))


def error_of(stderr: float | None, observations: int) -> Spread | None:
    """Return a standard error with its degrees of freedom; None if it is unknown or from a single observation.

    Args:
        stderr: standard error, for example from a jackknife.
        observations: number of independent items, documents or subjects behind the error.
    """
    if stderr is None or not math.isfinite(stderr) or observations < 2:
        return None
    return Spread(stderr, observations - 1)


def with_interval(value: float, error: Spread | None) -> dict[str, float | None]:
    """Return a value and its interval, `low` to `high`; both ends are None without an error.

    Args:
        value: the middle of the interval.
        error: standard error of the value; None if unknown.

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
    """Return the quantile of Student's t.

    Example:
        >>> round(t_quantile(0.975, 9), 4)
        2.2622
    """
    from scipy.stats import t

    return float(t.ppf(probability, degrees))


def resolvable(*errors: Spread | None, tests: int = 1) -> float:
    """Return the smallest difference that the measurement detects with a probability of `POWER`.

    Args:
        errors: standard errors; an error that is None or 0 adds nothing.
        tests: number of intervals that must hold all at once.
    """
    tail = (1 - CONFIDENCE) / 2 / tests
    seen = (
        (t_quantile(1 - tail, error.degrees) + t_quantile(POWER, error.degrees)) * error.value
        for error in errors
        if error
    )
    return math.hypot(*seen)


def seeds_to_resolve(difference: float, documents: Spread | None, seeds: Spread, tests: int = 1) -> int | None:
    """Return the number of seeds needed to detect a difference; None if more seeds on these documents do not help.

    Args:
        difference: smallest difference that matters.
        documents: standard error over documents, which more seeds do not change.
        seeds: spread from seed to seed.
        tests: number of intervals that must hold all at once.
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
    """Return the verdict of an interval about a difference in bits per byte (less is better).

    Args:
        difference: arm minus reference.
        half: half the width of the interval.
        could_resolve: smallest difference that the measurement detects with a probability of `POWER`.
        margin: largest difference that is too small to matter.

    Returns:
        `tie` if the whole interval lies within the margin and the measurement can detect a difference as large as the
        margin; `better` or `worse` if the interval excludes 0; otherwise `not resolved`.
    """
    if abs(difference) + half <= margin and could_resolve <= margin:
        return "tie"
    if abs(difference) <= half:
        return "not resolved"
    return "better" if difference < 0 else "worse"
