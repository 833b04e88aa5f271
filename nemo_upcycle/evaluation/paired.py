"""Is one model better than another on the same items, and how sure is that?

Items are not independent: windows of a document share its style, questions of a subject its difficulty. What is left
out or drawn again is therefore a whole cluster, all items of a document or of a subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.compare import cluster_sums, item_pairs, jackknife_stderr, left_out, statistic, value_of
from nemo_upcycle.evaluation.statistics import CONFIDENCE, Spread, half_width


#: Bootstrap draws: enough for two digits of an interval's ends.
_DRAWS = 2000
#: Clusters that a bootstrap needs: of fewer it draws too often the same ones, and its intervals are too narrow.
LEAST_CLUSTERS = 10


def paired_difference(a: dict[str, Any], b: dict[str, Any], metric: str, tests: int = 1) -> dict[str, Any]:
    """Measure the difference of `b` from `a`, with the uncertainty of the difference itself.

    Both models saw the same items, so the difficulty of an item cancels: the paired standard error is far below that
    of either value.

    Args:
        a: an evaluation.
        b: another one, of the same items.
        metric: a key of `metrics`, for example `heldout_perplexity/bits_per_byte`.
        tests: number of differences that are judged together: their intervals hold all at once.

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
    half = None if stderr is None else half_width(Spread(stderr, clusters - 1), tests=tests)
    return {
        "difference": value,
        "stderr": stderr,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
        "bootstrap": _bootstrap(name, *sums) if clusters >= LEAST_CLUSTERS and not identical else None,
        "mcnemar_p": mcnemar_p(*scores) if all(score in (0, 1) for side in scores for score in side) else None,
        "items": len(pairs),
        "clusters": clusters,
        "higher_is_better": a["metrics"][metric]["higher_is_better"],
        "identical": identical,
        "significant": half is not None and abs(value) > half,
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
    from scipy.stats import binomtest

    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _bootstrap(metric: str, a: list[tuple[float, float]], b: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the ends of the percentile interval; the draws are always the same."""
    import numpy

    drawn = numpy.random.default_rng(0).integers(0, len(a), size=(_DRAWS, len(a)))
    sums = [numpy.asarray(side)[drawn].sum(axis=1) for side in (a, b)]
    one, other = ([value_of(metric, total, units) for total, units in side.tolist()] for side in sums)
    differences = numpy.asarray(other) - numpy.asarray(one)
    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)
