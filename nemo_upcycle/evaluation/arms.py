"""Compare arms of a grid that were trained with several seeds and scored on the same held-out texts.

Two things make a difference uncertain: which texts were scored, and which random numbers the training drew. The first
is a jackknife over documents of the difference averaged over seeds; the second the spread of the difference from seed
to seed. Their squares are added: a little too much, since a seed's spread holds some of the first.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.compare import jackknife_stderr, left_out
from nemo_upcycle.evaluation.heldout import METRIC, Sums, bits_per_byte


#: Bits per byte that rounding alone may make: 8e-5 were seen between a dense model and its copies in bfloat16.
ROUNDING = 2e-4
#: Bits per byte that do not matter: a thousandth of the 2 that a small model takes for a byte of English.
MARGIN = 2e-3


def mean_of_seeds(seeds: Mapping[int, Sums]) -> dict[str, Any]:
    """Return the mean of bits per byte over seeds, as `mean_of` does."""
    return mean_of([bits_per_byte(sums) for sums in seeds.values()])


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Return a mean as `value`, its `stderr`, and the 95 % interval (t) `low` to `high`; None of one value.

    Example:
        >>> mean_of([1.0, 1.2])["value"], mean_of([1.0])
        (1.1, {'value': 1.0, 'stderr': None, 'low': None, 'high': None})
    """
    value, stderr = statistics.fmean(values), _stderr(values)
    if stderr is None:
        return {"value": value, "stderr": None, "low": None, "high": None}
    half_width = stderr * _t_quantile(len(values) - 1)
    return {"value": value, "stderr": stderr, "low": value - half_width, "high": value + half_width}


def difference_of_arms(
    arm: Mapping[int, Sums], reference: Mapping[int, Sums], margin: float = MARGIN
) -> dict[str, Any]:
    """Return by how much an arm differs from a reference, at the same seeds and on the same documents.

    Args:
        arm: sums by seed.
        reference: sums of the other arm; seeds that one of them lacks are left out.
        margin: bits per byte that do not matter.

    Returns:
        `difference` (bits per byte, arm minus reference: below 0 the arm is better), `stderr_documents`,
        `stderr_seeds` (None of one seed), `stderr` of both, the 95 % interval `low` to `high` (t, with the degrees of
        freedom of Welch and Satterthwaite), `seeds` (`seed` and `difference` of each), `documents` (how many), and
        `verdict`: `tie` where the whole interval lies inside the margin, `better` or `worse` where it leaves 0 out,
        else `not resolved`.

    Raises:
        UpcycleError: the two have no seed in common, or were not scored on the same documents.
    """
    common = sorted(set(arm) & set(reference))
    names = list(arm[common[0]]) if common else []
    if not common or any(list(side[seed]) != names for side in (arm, reference) for seed in common):
        raise UpcycleError(
            "two arms", got="no seed in common, or other documents", expected="both", fix="train both in one grid"
        )
    seeds = {seed: bits_per_byte(arm[seed]) - bits_per_byte(reference[seed]) for seed in common}
    without = [
        [after - before for before, after in zip(_without(reference[seed]), _without(arm[seed]), strict=True)]
        for seed in common
    ]
    documents = jackknife_stderr([statistics.fmean(values) for values in zip(*without, strict=True)])
    spread = _stderr(list(seeds.values()))
    stderr = math.hypot(documents or 0.0, spread or 0.0)
    half_width = stderr * _t_quantile(_degrees((documents, len(names) - 1), (spread, len(common) - 1)))
    value = statistics.fmean(seeds.values())
    return {
        "difference": value,
        "stderr": stderr,
        "stderr_documents": documents,
        "stderr_seeds": spread,
        "low": value - half_width,
        "high": value + half_width,
        "seeds": [{"seed": seed, "difference": own} for seed, own in seeds.items()],
        "documents": len(names),
        "verdict": _verdict(value, half_width, margin),
    }


def _verdict(value: float, half_width: float, margin: float) -> str:
    """Name the verdict of an interval. One that lies within the margin, or within twice `ROUNDING`, is a tie."""
    if abs(value) + half_width <= max(margin, 2 * ROUNDING):
        return "tie"
    if abs(value) <= half_width:
        return "not resolved"
    return "better" if value < 0 else "worse"


def _without(sums: Sums) -> list[float]:
    """Return the bits per byte without each document in turn."""
    return left_out(METRIC, list(sums.values()))


def _degrees(*parts: tuple[float | None, int]) -> float:
    """Return the degrees of freedom of standard errors that were added, from those of each (Welch-Satterthwaite)."""
    squares = [(error**2, free) for error, free in parts if error]
    total = sum(square for square, _ in squares)
    return total**2 / sum(square**2 / free for square, free in squares) if squares else math.inf


def _t_quantile(degrees: float) -> float:
    """Return the half of a 95 % interval, in standard errors."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def better_from(along: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the first number of tokens from which on an arm is always better; None where it is not at the end.

    Args:
        along: what `difference_of_arms` returned after more and more `tokens`.

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


def rank_arms(arms: Mapping[str, Mapping[int, Sums]], margin: float = MARGIN) -> list[dict[str, Any]]:
    """Rank arms by their bits per byte, best first.

    The best of many is the best by luck, too: intervals are Tukey's, for all pairs of arms at once. The spread from
    seed to seed is pooled over the arms, in blocks of a seed: of each arm alone there are too few.

    Args:
        arms: name -> sums by seed, of the same documents; at least one seed is common to all.
        margin: bits per byte that do not matter.

    Returns:
        `arm`, `value` over the common seeds, and `to_best`: `difference`, `stderr`, `low`, `high` and `verdict` as in
        `difference_of_arms`; None of the best itself.
    """
    seeds = sorted(set.intersection(*(set(scores) for scores in arms.values())))
    reached = {name: [bits_per_byte(scores[seed]) for seed in seeds] for name, scores in arms.items()}
    ranked = sorted(reached, key=lambda name: statistics.fmean(reached[name]))
    best = {seed: arms[ranked[0]][seed] for seed in seeds}
    spread, free = _pooled(list(reached.values()))
    ranking = []
    for name in ranked:
        entry: dict[str, Any] = {"arm": name, "value": statistics.fmean(reached[name]), "to_best": None}
        if name != ranked[0]:
            own = difference_of_arms({seed: arms[name][seed] for seed in seeds}, best)
            documents = (own["stderr_documents"], own["documents"] - 1)
            stderr = math.hypot(documents[0] or 0.0, spread or 0.0)
            half_width = stderr * _tukey_quantile(len(arms), _degrees(documents, (spread, free)))
            value = own["difference"]
            if value == 0 == own["stderr"]:  # the same bits, about which other arms say nothing
                stderr = half_width = 0.0
            entry["to_best"] = {"difference": value, "stderr": stderr, "verdict": _verdict(value, half_width, margin)}
            entry["to_best"] |= {"low": value - half_width, "high": value + half_width}
        ranking.append(entry)
    return ranking


def _pooled(values: Sequence[Sequence[float]]) -> tuple[float | None, int]:
    """Return the standard error of a difference of two arms from the spread over seeds, and its degrees of freedom.

    Args:
        values: values by arm and seed, the seeds in the same order. What a seed does to all arms is no spread.
    """
    arms, seeds = len(values), len(values[0])
    if seeds < 2:
        return None, 0
    of_arm = [statistics.fmean(row) for row in values]
    of_seed = [statistics.fmean(column) for column in zip(*values, strict=True)]
    whole = statistics.fmean(of_arm)
    squares = sum(
        (value - of_row - common + whole) ** 2
        for row, of_row in zip(values, of_arm, strict=True)
        for value, common in zip(row, of_seed, strict=True)
    )
    free = (arms - 1) * (seeds - 1)
    return math.sqrt(2 * squares / free / seeds), free


def _tukey_quantile(arms: int, degrees: float) -> float:
    """Return the half of an interval that holds for all pairs of arms with 95 %, in errors of a difference."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(0.95, arms, min(degrees, 1e5))) / math.sqrt(2)


def sums_after(tokens: float, scores: Mapping[int, Mapping[int, Sums]]) -> dict[int, Sums]:
    """Return the scores of an arm's seeds after some tokens, interpolated between two points of its curve if need be.

    Each document's score is taken to be linear in the logarithm of the tokens.

    Args:
        tokens: number of tokens, between the first point after step 0 and the last one.
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


def _stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
