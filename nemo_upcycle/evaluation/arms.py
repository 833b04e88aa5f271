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


def mean_of_seeds(seeds: Mapping[int, Sums]) -> tuple[float, float | None]:
    """Return the mean of bits per byte over seeds, and the standard error that their spread gives of two."""
    return mean_and_stderr([bits_per_byte(sums) for sums in seeds.values()])


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error; None of one value."""
    return statistics.fmean(values), _stderr(values)


def difference_of_arms(arm: Mapping[int, Sums], reference: Mapping[int, Sums], comparisons: int = 1) -> dict[str, Any]:
    """Return by how much an arm differs from a reference, at the same seeds and on the same documents.

    Args:
        arm: sums by seed.
        reference: of the other arm; seeds that one of them lacks are left out.
        comparisons: how many the interval has to allow for (Bonferroni).

    Returns:
        `difference` (bits per byte, arm minus reference: below 0 the arm is better), `stderr_documents`,
        `stderr_seeds` (None of one seed), `stderr` of both, the 95 % interval `low` to `high` (t, with the degrees of
        freedom of Welch and Satterthwaite), `seeds` (the difference of each), `documents` (how many), and `verdict`:
        `better` or `worse` where the interval leaves 0 out and the difference is above `ROUNDING`, else `tie`.

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
    half_width = stderr * _t_quantile((documents, len(names)), (spread, len(common)), comparisons=comparisons)
    value = statistics.fmean(seeds.values())
    is_tie = abs(value) <= max(half_width, ROUNDING)
    return {
        "difference": value,
        "stderr": stderr,
        "stderr_documents": documents,
        "stderr_seeds": spread,
        "low": value - half_width,
        "high": value + half_width,
        "seeds": seeds,
        "documents": len(names),
        "verdict": "tie" if is_tie else ("better" if value < 0 else "worse"),
    }


def _without(sums: Sums) -> list[float]:
    """Return the bits per byte without each document in turn."""
    return left_out(METRIC, list(sums.values()))


def _t_quantile(*parts: tuple[float | None, int], comparisons: int) -> float:
    """Return the factor of a 95 % interval, from the standard errors that were added and their numbers of values."""
    from scipy.stats import t

    squares = [(error**2, count - 1) for error, count in parts if error]
    if not squares:
        return 0.0
    degrees = sum(square for square, _ in squares) ** 2 / sum(square**2 / free for square, free in squares)
    return float(t.ppf(1 - 0.025 / comparisons, degrees))


def better_from(differences: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the first number of tokens from which on an arm is always better; None where it is not at the end.

    Args:
        differences: by tokens, what `difference_of_arms` returned.

    Example:
        >>> better_from({0: {"verdict": "tie"}, 100: {"verdict": "better"}, 200: {"verdict": "better"}})
        100
    """
    found = None
    for tokens in sorted(differences, reverse=True):
        if differences[tokens]["verdict"] != "better":
            break
        found = tokens
    return found


def rank_arms(arms: Mapping[str, Mapping[int, Sums]]) -> list[dict[str, Any]]:
    """Rank arms by their bits per byte, best first.

    Args:
        arms: by name, sums by seed, of the same documents.

    Returns:
        `arm`, `value`, and `to_best`: what `difference_of_arms` says of it and the best one; None of the best itself.
        The intervals allow for all pairs of arms: the best one is the best by luck, too.
    """
    pairs = len(arms) * (len(arms) - 1) // 2
    ranked = sorted(arms, key=lambda name: mean_of_seeds(arms[name])[0])
    best = arms[ranked[0]]
    return [
        {
            "arm": name,
            "value": mean_of_seeds(arms[name])[0],
            "to_best": difference_of_arms(arms[name], best, pairs) if name != ranked[0] else None,
        }
        for name in ranked
    ]


def tokens_to_reach(value: float, reached: Mapping[int, float]) -> float | None:
    """Return after how many tokens trainings of several lengths reach a value; None outside of what they reach.

    Between two lengths bits per byte are taken to be linear in the logarithm of the tokens.

    Args:
        value: bits per byte.
        reached: bits per byte at the end, by the tokens of each training.

    Example:
        >>> round(tokens_to_reach(1.5, {100: 2.0, 400: 1.0}))
        200
    """
    points = sorted(reached.items())
    for (tokens, high), (more, low) in itertools.pairwise(points):
        if low <= value <= high and high > low:
            share = (high - value) / (high - low)
            return math.exp((1 - share) * math.log(tokens) + share * math.log(more))
    return None


def _stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
