"""Compare arms of a grid that were trained with several seeds and scored on the same held-out texts.

Two things make a difference uncertain: which texts were scored, and which random numbers the training drew. The first
is a jackknife over documents of the difference averaged over seeds; the second the spread of the difference from seed
to seed. Their squares are added: a little too much, since a seed's spread holds some of the first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.compare import jackknife_stderr, value_of


#: Log-likelihood in nats and bytes of a document.
Sums = dict[str, tuple[float, float]]
_METRIC = "bits_per_byte"


def document_sums(evaluation: Mapping[str, Any], task: str) -> Sums:
    """Return the sums of every held-out document of an evaluation.

    Args:
        evaluation: what `ask` returned.
        task: of held-out texts.

    Raises:
        UpcycleError: it has no such task, or a number is not finite.
    """
    if task not in evaluation["items"]:
        raise UpcycleError.unknown("task of the evaluation", task, evaluation["items"])
    found: Sums = {}
    for item in evaluation["items"][task]:
        total, size_bytes = item["scores"][_METRIC]
        before = found.get(item["cluster"], (0.0, 0.0))
        found[item["cluster"]] = (before[0] + total, before[1] + size_bytes)
    return found


def bits_per_byte(sums: Sums) -> float:
    """Return the bits per byte of all documents together.

    Example:
        >>> round(bits_per_byte({"a": (-69.3147, 50), "b": (-69.3147, 50)}), 4)
        2.0
    """
    return _value(list(sums.values()))


def mean_of_seeds(seeds: Sequence[Sums]) -> tuple[float, float | None]:
    """Return the mean of bits per byte over seeds, and the standard error that their spread gives of two."""
    values = [bits_per_byte(sums) for sums in seeds]
    return statistics.fmean(values), _stderr(values)


def difference_of_arms(arm: Sequence[Sums], reference: Sequence[Sums]) -> dict[str, Any]:
    """Return by how much an arm differs from a reference, at the same seeds and on the same documents.

    Args:
        arm: sums of each seed.
        reference: of the other arm, in the same order of seeds.

    Returns:
        `difference` (bits per byte, arm minus reference: below 0 the arm is better), `stderr_documents`,
        `stderr_seeds` (None of one seed), `stderr` of both, `seeds` (the difference of each), and `verdict`: `better`
        or `worse` beyond twice the standard error, else `tie`.

    Raises:
        UpcycleError: the two were not scored on the same documents.
    """
    names = list(arm[0])
    if any(list(sums) != names for sums in (*arm, *reference)) or len(arm) != len(reference):
        raise UpcycleError(
            "documents of two arms", got="others", expected="the same", fix="train both in one grid, with one suite"
        )
    seeds = [bits_per_byte(one) - bits_per_byte(other) for one, other in zip(arm, reference, strict=True)]
    left_out = []
    for name in names if len(names) > 1 else ():
        without = [
            _value([one[other] for other in names if other != name])
            - _value([two[other] for other in names if other != name])
            for one, two in zip(arm, reference, strict=True)
        ]
        left_out.append(statistics.fmean(without))
    documents, spread = jackknife_stderr(left_out), _stderr(seeds)
    stderr = math.hypot(documents or 0.0, spread or 0.0)
    value = statistics.fmean(seeds)
    verdict = "tie" if abs(value) <= 2 * stderr else ("better" if value < 0 else "worse")
    return {
        "difference": value,
        "stderr": stderr,
        "stderr_documents": documents,
        "stderr_seeds": spread,
        "seeds": seeds,
        "documents": len(names),
        "verdict": verdict,
    }


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


def _value(sums: Sequence[tuple[float, float]]) -> float:
    return value_of(_METRIC, math.fsum(total for total, _ in sums), math.fsum(size for _, size in sums))


def _stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
