"""Is one model better than another on the same items, and how certain is the answer?

Items are not independent: windows of a document share its style, and questions of a subject share its difficulty. The
jackknife therefore leaves out a whole cluster at a time. A cluster is all items of a document, or of a subject.
"""

from __future__ import annotations

from typing import Any

from nemo_upcycle.evaluation.compare import cluster_of, cluster_sums, item_pairs, jackknife_stderr, left_out, statistic
from nemo_upcycle.evaluation.statistics import error_of, half_width


def paired_difference(a: dict[str, Any], b: dict[str, Any], metric: str, tests: int = 1) -> dict[str, Any]:
    """Measure the difference `b` minus `a`, with the uncertainty of the difference itself.

    Both models saw the same items, so the difficulty of an item cancels. The paired standard error is far below the
    standard error of either value.

    Args:
        a: an evaluation.
        b: another evaluation, of the same items.
        metric: a key of the `metrics` of both evaluations, for example `heldout_perplexity/bits_per_byte`.
        tests: number of differences that are judged together; the intervals are so wide that all hold at once.

    Returns:
        `difference` (b minus a), `stderr` (a jackknife over clusters), `low` and `high` (a 95 % t interval; None with
        fewer than two clusters), `items`, `clusters`, `higher_is_better`, `identical` (every item has the same score)
        and `significant` (the interval excludes 0). Identical scores do not show how far the models differ on other
        items, so the result has no error and no interval.

    Raises:
        UpcycleError: the evaluations do not have the same items.
    """
    task, _, name = metric.rpartition("/")
    leaves = a["groups"].get(task, [task])
    pairs = [(leaf, pair) for leaf in leaves for pair in item_pairs(a, b, leaf)]
    scores = [[pair[side]["scores"][name] for _, pair in pairs] for side in (0, 1)]
    keys = [(leaf, cluster_of(pair[0])) for leaf, pair in pairs]
    sums = [cluster_sums(name, side, keys) for side in scores]
    value = statistic(name, scores[1]) - statistic(name, scores[0])
    without = zip(*(left_out(name, side) for side in sums), strict=True)
    identical = scores[0] == scores[1]
    stderr = None if identical else jackknife_stderr([other - one for one, other in without])
    clusters = len(sums[0])
    error = error_of(stderr, clusters)
    half = None if error is None else half_width(error, tests=tests)
    return {
        "difference": value,
        "stderr": stderr,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
        "items": len(pairs),
        "clusters": clusters,
        "higher_is_better": a["metrics"][metric]["higher_is_better"],
        "identical": identical,
        "significant": half is not None and abs(value) > half,
    }
