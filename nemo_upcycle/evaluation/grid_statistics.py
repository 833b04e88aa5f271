"""Compare arms of a grid that were trained with several seeds and scored on the same held-out texts.

Two things make a difference uncertain: the choice of the texts, and the random numbers of the training. The error over
texts is a jackknife over documents, for the difference averaged over seeds. The error over random numbers is the
spread from seed to seed, pooled over the arms if an arm has few seeds. `statistics.py` turns both into intervals and
verdicts.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_upcycle.evaluation.compare import jackknife_stderr, left_out
from nemo_upcycle.evaluation.heldout import METRIC, Sums, bits_per_byte
from nemo_upcycle.evaluation.statistics import (
    MARGIN,
    Spread,
    error_of,
    half_width,
    pooled,
    resolvable,
    seed_spread,
    seeds_to_resolve,
    spread_of,
    spread_without_seeds,
    verdict,
    with_interval,
)


#: Verdicts if only one seed or one document was measured, so the effect of other seeds or documents is unknown.
ONE_SEED, ONE_DOCUMENT = "one seed", "one document"


def mean_of_seeds(seeds: Mapping[int, Sums]) -> dict[str, Any]:
    """Average bits per byte over seeds, as `mean_of` does."""
    return mean_of([bits_per_byte(sums) for sums in seeds.values()])


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean as `value`, and its 95 % t interval as `low` and `high` (None if there is a single value).

    Example:
        >>> mean_of([1.0, 1.2])["value"], mean_of([1.0])
        (1.1, {'value': 1.0, 'low': None, 'high': None})
    """
    spread = spread_of(values)
    return with_interval(statistics.fmean(values), spread and spread.of_mean(len(values)))


def pooled_spread(families: Iterable[Mapping[str, Mapping[int, Sums]]]) -> Spread | None:
    """Pool the arms' spread from seed to seed; return None if no family has two arms with two seeds.

    Args:
        families: groups of arms on which a seed has the same effect, such as the arms of one parent after the same
            number of tokens. A group maps each arm's name to its sums by seed. Arms with identical bits count once.
    """
    spreads = []
    for arms in families:
        values = {name: {seed: bits_per_byte(sums) for seed, sums in seeds.items()} for name, seeds in arms.items()}
        different = {tuple(sorted(of_arm.items())): name for name, of_arm in values.items() if of_arm}
        if not different:
            continue
        if spread := spread_without_seeds({name: values[name] for name in different.values()}):
            spreads.append(spread)
    return pooled(spreads)


def difference_of_arms(arm: Mapping[int, Sums], reference: Mapping[int, Sums]) -> dict[str, Any]:
    """Measure the difference of an arm from a reference, at the same seeds and on the same documents.

    Args:
        arm: sums by seed.
        reference: sums of the other arm, for the same documents and at least one common seed; other seeds are ignored.

    Returns:
        `difference` (bits per byte, arm minus reference; negative if the arm is better), `stderr_documents`, `seeds`
        (`seed` and `difference` of each seed), and `documents` (number of documents). `judge` adds the conclusions.
    """
    common = sorted(set(arm) & set(reference))
    seeds = {seed: bits_per_byte(arm[seed]) - bits_per_byte(reference[seed]) for seed in common}
    without = [
        [after - before for before, after in zip(_without(reference[seed]), _without(arm[seed]), strict=True)]
        for seed in common
    ]
    return {
        "difference": statistics.fmean(seeds.values()),
        "stderr_documents": jackknife_stderr([statistics.fmean(values) for values in zip(*without, strict=True)]),
        "seeds": [{"seed": seed, "difference": own} for seed, own in seeds.items()],
        "documents": len(arm[common[0]]),
    }


def judge(found: dict[str, Any], others: Spread | None, margin: float = MARGIN, tests: int = 1) -> dict[str, Any]:
    """Add the interval and the verdict to a difference.

    Args:
        found: result of `difference_of_arms`.
        others: result of `pooled_spread` for the arms of the grid.
        margin: largest difference in bits per byte that is too small to matter.
        tests: number of differences that are judged together; the intervals are so wide that all hold at once.

    Returns:
        `found` with further keys: `stderr_seeds`, its degrees of freedom `seed_degrees`, whether this error
        `is_pooled`, the interval `low` to `high`, `resolvable` (the smallest difference that the grid detects with a
        probability of 80 %), `seeds_needed` (number of seeds that are needed to detect a difference of the margin;
        None if more seeds do not help), and the `verdict` (`statistics.verdict`). With only one seed or one document,
        the verdict is `ONE_SEED` or `ONE_DOCUMENT`. If no arm has two seeds, the other new values are None.
    """
    values = [one["difference"] for one in found["seeds"]]
    of_both = others and Spread(math.sqrt(2) * others.value, others.degrees)
    spread, documents = seed_spread(values, of_both), _documents(found)
    judged = {**found, "stderr_seeds": None, "seed_degrees": None, "is_pooled": False, "low": None, "high": None}
    lacks = ONE_DOCUMENT if found["documents"] == 1 else ONE_SEED
    judged |= {"resolvable": None, "seeds_needed": None, "verdict": lacks}
    if is_identical(found):
        spread = Spread(0.0, max(len(values) - 1, 1))
    if spread is None:
        return judged
    errors = (documents, spread.of_mean(len(values)))
    half, could = half_width(*errors, tests=tests), resolvable(*errors, tests=tests)
    return judged | {
        "stderr_seeds": errors[1].value,
        "seed_degrees": spread.degrees,
        "is_pooled": spread is of_both,
        "low": found["difference"] - half,
        "high": found["difference"] + half,
        "resolvable": could,
        "seeds_needed": seeds_to_resolve(margin, documents, spread, tests),
        "verdict": verdict(found["difference"], half, could, margin) if is_judged(found) else judged["verdict"],
    }


def is_identical(found: Mapping[str, Any]) -> bool:
    """Return whether all scores of the two arms are equal, so that no statistics are needed."""
    return not found["stderr_documents"] and not any(one["difference"] for one in found["seeds"])


def is_judged(found: Mapping[str, Any]) -> bool:
    """Return whether a difference has enough seeds and documents for a verdict."""
    return is_identical(found) or (len(found["seeds"]) > 1 and found["documents"] > 1)


def _documents(found: Mapping[str, Any]) -> Spread | None:
    return error_of(found["stderr_documents"], found["documents"])


def _without(sums: Sums) -> list[float]:
    """Return the bits per byte with one document left out at a time."""
    return left_out(METRIC, list(sums.values()))


def better_from(along: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the number of tokens after which an arm stays better; None if the arm is not better at the end.

    The points are tested from the end until the arm is not better at a point. Tests in an order that is fixed
    beforehand need no correction for their number. So the result is as certain as one verdict of the table.

    Args:
        along: judged results of `difference_of_arms`, in ascending order of `tokens`.

    Example:
        >>> better_from([{"tokens": 0, "verdict": "tie"}, {"tokens": 100, "verdict": "better"}])
        100
    """
    tokens = None
    for point in reversed(along):
        if point["verdict"] != "better":
            break
        tokens = point["tokens"]
    return tokens


def sums_after(tokens: float, scores: Mapping[int, Mapping[int, Sums]]) -> dict[int, Sums]:
    """Return the scores of an arm's seeds after some tokens, interpolated on the arm's curve if necessary.

    Each document's score is assumed to be linear in the logarithm of the tokens.

    Args:
        tokens: number of tokens, between the first point after step 0 and the last point.
        scores: tokens -> seed -> sums of the documents.

    Example:
        >>> sums_after(200, {100: {1: {"a": (-20.0, 8)}}, 400: {1: {"a": (-10.0, 8)}}})
        {1: {'a': (-15.0, 8)}}
    """
    points = sorted(filter(None, scores))
    if tokens in points:
        return dict(scores[round(tokens)])
    before, after = next((few, more) for few, more in itertools.pairwise(points) if few < tokens < more)
    share = math.log(tokens / before) / math.log(after / before)
    return {
        seed: {
            document: (total + share * (scores[after][seed][document][0] - total), size_bytes)
            for document, (total, size_bytes) in sums.items()
        }
        for seed, sums in scores[before].items()
        if seed in scores[after]
    }
