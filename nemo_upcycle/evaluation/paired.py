"""Is one model better than another on the same items, and how sure is that?

Items are not independent: windows of a document share its style, questions of a subject its difficulty. What is left
out or drawn again is therefore a whole cluster, all items of a document or of a subject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.compare import cluster_sums, item_pairs, jackknife_stderr, left_out, statistic, value_of


_CONFIDENCE = 0.95
#: Bootstrap draws: enough for two digits of an interval's ends.
_DRAWS = 2000
#: Clusters that a bootstrap needs: of fewer it draws too often the same ones, and its intervals are too narrow.
LEAST_CLUSTERS = 10


def paired_difference(a: dict[str, Any], b: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return the difference of `b` from `a`, with the uncertainty of the difference itself.

    Both models saw the same items, so the difficulty of an item cancels: the paired standard error is far below that
    of either value.

    Args:
        a: an evaluation.
        b: another one, of the same items.
        metric: a key of `metrics`, for example `heldout_perplexity/bits_per_byte`.

    Returns:
        `difference` (b minus a), its `stderr` (a jackknife over clusters), a 95 % t interval `low` to `high` (None
        with fewer than two clusters), `bootstrap` (the 95 % percentile interval over clusters; None with fewer than
        `LEAST_CLUSTERS`), `mcnemar_p` (the exact two-sided test, of a metric that is 0 or 1 for every item; it takes
        items for independent), `items`, `clusters`, `higher_is_better`,
        `identical`: every item has the same score, which says nothing of how far other items would differ, so there
        is no error and no interval; and `significant`: the t interval leaves 0 out.

    Raises:
        UpcycleError: no such metric, or not the same items.
    """
    for result in (a, b):
        if metric not in result["metrics"]:
            raise UpcycleError.unknown(f"metric of evaluation {result['name']}", metric, result["metrics"])
    task, _, name = metric.rpartition("/")
    leaves = a["groups"].get(task, [task])
    pairs = [(leaf, pair) for leaf in leaves for pair in item_pairs(a, b, leaf)]
    scores = [[pair[side]["scores"][name] for _, pair in pairs] for side in (0, 1)]
    keys = [(leaf, pair[0].get("cluster", pair[0]["id"])) for leaf, pair in pairs]
    sums = [cluster_sums(name, side, keys) for side in scores]
    value = statistic(name, scores[1]) - statistic(name, scores[0])
    without = zip(*(left_out(name, side) for side in sums), strict=True)
    identical = scores[0] == scores[1]
    stderr = None if identical else jackknife_stderr([other - one for one, other in without])
    clusters = len(sums[0])
    half_width = None if stderr is None else stderr * t_quantile(clusters - 1)
    return {
        "difference": value,
        "stderr": stderr,
        "low": None if half_width is None else value - half_width,
        "high": None if half_width is None else value + half_width,
        "bootstrap": _bootstrap(name, *sums) if clusters >= LEAST_CLUSTERS and not identical else None,
        "mcnemar_p": mcnemar_p(*scores) if all(score in (0, 1) for side in scores for score in side) else None,
        "items": len(pairs),
        "clusters": clusters,
        "higher_is_better": a["metrics"][metric]["higher_is_better"],
        "identical": identical,
        "significant": half_width is not None and abs(value) > half_width,
    }


def mcnemar_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the p value of the exact McNemar test: are the items that one model alone gets right evenly shared?

    Args:
        a: 0 or 1 for each item.
        b: likewise, of the same items.

    Example:
        >>> mcnemar_p([1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1])  # five to none
        0.0625
    """
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    differing, ways, tail = only_a + only_b, 1, 0
    for fewer in range(min(only_a, only_b) + 1):  # whole numbers: exact for any number of items
        tail += ways
        ways = ways * (differing - fewer) // (fewer + 1)
    return min(1.0, 2 * tail / 2**differing)


def _bootstrap(metric: str, a: list[tuple[float, float]], b: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the ends of the percentile interval; the draws are always the same."""
    import numpy

    drawn = numpy.random.default_rng(0).integers(0, len(a), size=(_DRAWS, len(a)))
    sums = [numpy.asarray(side)[drawn].sum(axis=1) for side in (a, b)]
    one, other = ([value_of(metric, total, units) for total, units in side.tolist()] for side in sums)
    differences = numpy.asarray(other) - numpy.asarray(one)
    tail = (1 - _CONFIDENCE) / 2
    low, high = numpy.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)


@cache
def t_quantile(degrees: int) -> float:
    """Return the half of a 95 % interval in standard errors, by Student's t, to nine digits.

    Args:
        degrees: degrees of freedom, 1 or more.

    Example:
        >>> round(t_quantile(9), 4)
        2.2622
    """
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < _CONFIDENCE else (low, middle)
    return low


def _t_within(t: float, degrees: int) -> float:
    """Return the probability that Student's t lies between -t and t: a finite sum for whole degrees of freedom."""
    odd = degrees % 2
    squared_cosine = degrees / (degrees + t * t)
    sine, term, total = math.sqrt(1 - squared_cosine), math.sqrt(squared_cosine) if odd else 1.0, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= squared_cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (math.atan(t / math.sqrt(degrees)) + sine * total) if odd else sine * total
