"""Measure how far two evaluations of the same items differ. `paired.py` says whether one model is better.

Pure functions of the results of `evaluate`. Every uncertainty is a jackknife estimate over the items, or over groups
of items. For a mean, this estimate is the usual standard error. The jackknife is also valid for perplexities (ratios
of sums).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from nemo_upcycle.errors import UpcycleError


Score = Any  # a number, or a pair for a metric that is a ratio of sums
#: Metrics of IFEval, whose prompts have several instructions: the share of all instructions that are followed.
INSTRUCTIONS = ("inst_level_strict_acc", "inst_level_loose_acc")
#: Metrics that divide two sums: log-likelihoods (nats) by words or bytes, or followed instructions by all
#: instructions. All other metrics are means.
RATIOS = ("word_perplexity", "byte_perplexity", "bits_per_byte", *INSTRUCTIONS)


def statistic(metric: str, scores: Sequence[Score]) -> float:
    """Return the value of a metric from the scores of its items, by lm-eval's definitions.

    Args:
        metric: name of the metric, without the task.
        scores: one entry per item: for the metrics in `RATIOS` a pair of the two numbers to sum and divide, such as
            log-likelihood and bytes; otherwise a number.

    Example:
        >>> statistic("acc", [1.0, 0.0])
        0.5
    """
    parts = parts_of(metric, scores)
    return value_of(metric, sum(part[0] for part in parts), sum(part[1] for part in parts))


def left_out(metric: str, parts: Sequence[tuple[float, float]]) -> list[float]:
    """Return the metric's values with one part left out at a time; an empty list for fewer than two parts.

    Args:
        metric: name of the metric, without the task.
        parts: the two sums that make the metric, for each item or for each group of items.
    """
    total, units = (sum(part[column] for part in parts) for column in (0, 1))
    return [value_of(metric, total - one, units - its) for one, its in parts] if len(parts) > 1 else []


def jackknife_stderr(left_out: Sequence[float]) -> float | None:
    """Return the jackknife standard error from the values with one item left out at a time.

    Returns:
        The standard error, or None with fewer than two items.
    """
    items = len(left_out)
    if items < 2:
        return None
    mean = sum(left_out) / items
    return math.sqrt((items - 1) / items * sum((entry - mean) ** 2 for entry in left_out))


def parts_of(metric: str, scores: Sequence[Score]) -> list[tuple[float, float]]:
    """Return each item's contribution to the two sums that make a metric."""
    return [(score[0], score[1]) if metric in RATIOS else (score, 1) for score in scores]


def cluster_sums(metric: str, scores: Sequence[Score], keys: Sequence[Hashable]) -> list[tuple[float, float]]:
    """Return the two sums that make a metric for each cluster, with clusters in the order of their first items.

    Args:
        metric: name of the metric, without the task.
        scores: one score per item; see `statistic`.
        keys: the cluster of each item.
    """
    sums: dict[Hashable, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for key, (total, units) in zip(keys, parts_of(metric, scores), strict=True):
        sums[key] = (sums[key][0] + total, sums[key][1] + units)
    return list(sums.values())


def value_of(metric: str, total: float, units: float) -> float:
    """Return a metric from its two sums."""
    mean = total / units
    if metric == "bits_per_byte":
        return -mean / math.log(2)
    return math.exp(-mean) if metric.endswith("perplexity") else mean


def observations(evaluation: dict[str, Any], metric: str) -> int:
    """Count the independent observations of a metric: documents, subjects, or items without a document or subject.

    Args:
        evaluation: result of `evaluate`.
        metric: key of the evaluation's `metrics`; see `paired_difference`.
    """
    task = metric.rpartition("/")[0]
    leaves = evaluation["groups"].get(task, [task])
    return len({(leaf, cluster_of(item)) for leaf in leaves for item in evaluation["items"].get(leaf, ())})


def cluster_of(item: dict[str, Any]) -> Hashable:
    """Return the document or subject that an item belongs to, or the item's own number if there is neither."""
    found: Hashable = item.get("cluster", item["id"])
    return found


def compare_items(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Compare two evaluations item by item.

    Args:
        a: the reference, a result of `evaluate`.
        b: the other result, for the same items.

    Returns:
        `items`, `loglikelihoods` (number of compared log-likelihoods), `max_absolute_loglikelihood_difference` (nats),
        `max_relative_loglikelihood_difference` (relative to `a`), `largest_at` (task and item id of the largest
        relative difference), `questions`, and `changed_answers` (questions whose preferred answer, or any score,
        differs).

    Raises:
        UpcycleError: the two models were not evaluated on the same items.
    """
    if set(a["items"]) != set(b["items"]):
        raise _different_items(a, b, f"they have the tasks {sorted(a['items'])} and {sorted(b['items'])}")
    count = {"items": 0, "loglikelihoods": 0, "questions": 0, "changed_answers": 0}
    absolute = relative = 0.0
    largest_at: dict[str, Any] | None = None
    for task in a["items"]:
        for one, other in item_pairs(a, b, task):
            count["items"] += 1
            count["questions"] += "answer" in one
            count["changed_answers"] += "answer" in one and _choices(one) != _choices(other)
            for x, y in zip(one["loglikelihoods"], other["loglikelihoods"], strict=True):
                count["loglikelihoods"] += 1
                absolute = max(absolute, abs(x - y))
                share = abs(x - y) / abs(x) if x else math.inf if y else 0.0
                if share > relative or largest_at is None:
                    relative, largest_at = share, {"task": task, "id": one["id"]}
    return {
        **count,
        "max_absolute_loglikelihood_difference": absolute,
        "max_relative_loglikelihood_difference": relative,
        "largest_at": largest_at,
    }


def _choices(item: dict[str, Any]) -> tuple[Any, ...]:
    return item["answer"], *item["scores"].values()


def item_pairs(a: dict[str, Any], b: dict[str, Any], task: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the items of a task from both evaluations, in the same order.

    Raises:
        UpcycleError: an item is in only one of the evaluations.
    """
    hashes_a, hashes_b = ([item["hash"] for item in result["items"].get(task, [])] for result in (a, b))
    if hashes_a != hashes_b or not hashes_a:
        reason = f"they have different items of {task} ({len(hashes_a)} and {len(hashes_b)})"
        raise _different_items(a, b, reason)
    yield from zip(a["items"][task], b["items"][task], strict=True)


def _different_items(a: dict[str, Any], b: dict[str, Any], reason: str) -> UpcycleError:
    return UpcycleError(
        f"Evaluations {a['name']} and {b['name']}",
        kind="refused",
        got=f"cannot be compared: {reason}",
        fix="evaluate both with the same suite and limit",
    )
