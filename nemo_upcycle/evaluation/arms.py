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
