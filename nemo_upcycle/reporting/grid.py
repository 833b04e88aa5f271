"""Compute the results of an ablation grid: each arm's scores, its differences, and their intervals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.grid_statistics import (
    better_from,
    difference_of_arms,
    is_judged,
    judge,
    mean_of,
    mean_of_seeds,
    pooled_spread,
    sums_after,
)
from nemo_upcycle.evaluation.heldout import Sums, by_source
from nemo_upcycle.evaluation.statistics import Spread


#: Name of the parent of arms that start from random weights.
UNTRAINED = "untrained"
#: If the FLOPs of two trainings differ by less than this share, the ends of these trainings are compared.
FLOPS_APART = 0.02


@dataclass(frozen=True)
class ArmRecord:
    """Measurements from an arm's trainings.

    Args:
        name: name of the arm.
        steps: number of steps of a whole training.
        tokens_per_step: number of tokens per step.
        schedule: learning-rate schedule.
        is_rate_constant: whether each point equals the result of a whole training of that length, either because the
            learning rate does not fall, or because each point is the end of a separate training.
        trained_seeds: seeds that were trained.
        ends: lengths of the arm's trainings (tokens); an arm that varies the length has several lengths.
        scores: tokens -> seed -> sums of the held-out documents; values that were not a number are omitted.
        routers: metric -> tokens -> mean over layers and seeds; empty for a dense arm.
        flops_per_token: training FLOPs per token, with full attention.
        rank_seconds_per_token: time per token (seconds times ranks); the time of a step is the time of its fastest
            seed, and the first step is excluded.
        parent: model from which the arm starts, in a grid whose arms have different parents.
    """

    name: str
    steps: int
    tokens_per_step: int
    schedule: str
    is_rate_constant: bool
    trained_seeds: list[int]
    ends: list[int]
    scores: dict[int, dict[int, Sums]]
    routers: dict[str, dict[int, float]]
    flops_per_token: float
    rank_seconds_per_token: float
    parent: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens of a whole training."""
        return self.steps * self.tokens_per_step

    @property
    def final(self) -> dict[int, Sums]:
        """Scores of the last step, by seed."""
        return self.scores.get(self.tokens, {})

    def is_comparable(self, tokens: float, other: ArmRecord, its_tokens: float) -> bool:
        """Return whether a point of this arm's curve may be compared with a point of another arm's curve.

        No other rule decides whether points are comparable. A falling learning rate makes the end of a training better
        than its middle. So two points are comparable only in two cases. Either each point equals the end of a whole
        training of its length. Or both points come after the same number of tokens in trainings with the same length
        and schedule.
        """
        schedules = [(arm.steps, arm.tokens_per_step, arm.schedule) for arm in (self, other)]
        are_ends = self._is_end(tokens) and other._is_end(its_tokens)
        return are_ends or (schedules[0] == schedules[1] and tokens == its_tokens)

    def is_scored_with(self, other: ArmRecord, tokens: int) -> bool:
        """Return whether both arms were scored after `tokens` with a common seed, and are comparable there."""
        seeds = set(self.scores.get(tokens, {})) & set(other.scores.get(tokens, {}))
        return bool(seeds) and self.is_comparable(tokens, other, tokens)

    def _is_end(self, tokens: float) -> bool:
        """Return whether the score after `tokens` equals the result of a whole training of that length."""
        return self.is_rate_constant or tokens in (0, self.tokens)


def arms_of(evidence: Mapping[str, Any]) -> dict[str, ArmRecord]:
    """Group the evidence of a grid by arm.

    Args:
        evidence: result of `collect_evidence` or `read_evidence`.
    """
    described, documents = evidence["described"]["cells"], evidence["documents"]
    cells: dict[str, list[str]] = defaultdict(list)
    for cell, about in described.items():
        cells[about["arm"]].append(cell)
    arms = {}
    for arm, names in cells.items():
        first = max((described[name] for name in names), key=itemgetter("steps"))
        is_curve = first.get("is_length", False)
        longest = [name for name in names if described[name]["steps"] == first["steps"]]
        left = [evidence["cells"][name] for name in longest]
        scores: dict[int, dict[int, Sums]] = defaultdict(dict)
        for name in names:
            for score in evidence["cells"][name]["scores"]:
                if is_curve and score["step"] not in (0, described[name]["steps"]):
                    continue
                sums = dict(zip(documents["names"], zip(score["nats"], documents["bytes"], strict=True), strict=True))
                scores[score["step"] * first["tokens_per_step"]][described[name]["seed"]] = sums
        arms[arm] = ArmRecord(
            name=arm,
            **{key: first[key] for key in ("steps", "tokens_per_step", "schedule")},
            is_rate_constant=first["is_rate_constant"] or is_curve,
            trained_seeds=[described[name]["seed"] for name in longest],
            ends=sorted({described[name]["steps"] * first["tokens_per_step"] for name in names}),
            scores=dict(sorted(scores.items())),
            routers=_routers(left),
            flops_per_token=left[0]["flops_per_token"],
            rank_seconds_per_token=_rank_seconds_per_token(left),
            parent=first.get("parent", ""),
        )
    return arms


def _rank_seconds_per_token(cells: list[Mapping[str, Any]]) -> float:
    """Measure the time per token, with the fastest seed of each step.

    The fastest seed is used because other work on the machine can only slow a step down. The first step compiles and
    allocates, so it is excluded unless it is the only step.
    """
    fastest: dict[int, float] = {}
    for cell in cells:
        for tokens, seconds in zip(cell["tokens"], cell["seconds"], strict=True):
            spent = seconds * cell["ranks"]
            fastest[tokens] = min(spent, fastest.get(tokens, spent))
    first, *others = sorted(fastest)
    return sum(fastest[tokens] for tokens in others) / (others[-1] - first) if others else fastest[first] / first


def _routers(cells: list[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    kept: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
        for name, values in cell["routers"].items():
            for tokens, value in zip(cell["tokens"], values, strict=True):
                if value is not None:
                    kept.setdefault(name, {}).setdefault(tokens, []).append(value)
    return {
        name: {tokens: statistics.fmean(numbers) for tokens, numbers in sorted(steps.items())}
        for name, steps in kept.items()
    }


def compare_arms(arms: Mapping[str, ArmRecord], described: Mapping[str, Any]) -> dict[str, Any]:
    """Compute every number of the table.

    Points of two curves are compared only if `ArmRecord.is_comparable` allows it. No key is a number, so that writing
    and reading JSON changes nothing. Every mean comes from `mean_of_seeds`, and every difference comes from `judge`.

    Args:
        arms: result of `arms_of`.
        described: entry `described` of the grid's plan.

    Returns:
        A dict with four keys. `margin`: largest difference in bits per byte that is too small to matter. `arms`: name
        -> `tokens`, `flops`, `rank_hours`, the means `bits_per_byte` (at the end) and `start`, `curve` (means with
        their `tokens`), `sources` (at the end), `routers` (metric -> pairs of tokens and value) and the seeds.
        `differences`: name -> `reference`, `better_from` (tokens), and the differences at the `start`, `along` the
        curve (at all tokens after which both arms were scored), at the `end` (the last of these tokens), and with
        `equal_flops`. A difference is None if nothing can be compared. `tests`: `start`, `end` and `equal_flops` ->
        number of differences judged together.
    """
    values: dict[str, Any] = {"margin": described["margin"], "arms": {}, "differences": {}}
    for name, arm in arms.items():
        for when, tokens in (("first", 0), ("last", arm.tokens)):
            if not arm.scores.get(tokens):
                raise UpcycleError(
                    f"Arm {name}",
                    kind="missing",
                    got=f"has no score at its {when} step",
                    fix=f"see the logs of {name}-seed*",
                )
        values["arms"][name] = {
            "about": described["arms"][name],
            "seeds": sorted(arm.final),
            "unscored_seeds": sorted(set(arm.trained_seeds) - set(arm.final)),
            "tokens": arm.tokens,
            "flops": arm.tokens * arm.flops_per_token,
            "rank_hours": arm.tokens * arm.rank_seconds_per_token / 3600,
            "bits_per_byte": mean_of_seeds(arm.final),
            "start": mean_of_seeds(arm.scores[0]),
            "curve": [{"tokens": tokens, **mean_of_seeds(seeds)} for tokens, seeds in arm.scores.items()],
            "sources": _sources(arm.final),
            "routers": {key: [[tokens, one] for tokens, one in points.items()] for key, points in arm.routers.items()},
        }
    spreads = {kind: _spreads(_of_kind(arms, kind)) for kind in (True, False)}
    return values | _differences(arms, described["references"], values["margin"], spreads)


def _of_kind(arms: Mapping[str, ArmRecord], is_untrained: bool) -> dict[str, ArmRecord]:
    return {name: arm for name, arm in arms.items() if (arm.parent == UNTRAINED) == is_untrained}


def _spreads(arms: Mapping[str, ArmRecord]) -> dict[str, Spread | None]:
    """Pool the arms' spread over seeds, at the `start` and at the `end` of whole trainings.

    Trainings from random weights have a larger spread than trainings from a parent, so the caller pools each kind
    separately.
    """
    starts: dict[str, dict[str, dict[int, Sums]]] = defaultdict(dict)
    ends: dict[tuple[str, int], dict[str, dict[int, Sums]]] = defaultdict(dict)
    for name, arm in arms.items():
        starts[arm.parent][name] = arm.scores[0]
        for tokens in arm.ends:
            ends[arm.parent, tokens][name] = arm.scores.get(tokens, {})
    return {"start": pooled_spread(starts.values()), "end": pooled_spread(ends.values())}


def _differences(
    arms: Mapping[str, ArmRecord],
    references: Mapping[str, str],
    margin: float,
    spreads: Mapping[bool, Mapping[str, Spread | None]],
) -> dict[str, Any]:
    """Compare arms with their references, and correct the verdicts for the number of differences in a table.

    Args:
        arms: all arms.
        references: arm -> its reference arm.
        margin: largest difference in bits per byte that is too small to matter.
        spreads: results of `_spreads` for the arms from random weights (True) and for all other arms (False).
    """
    found = {name: _difference(arms[name], arms[other]) for name, other in references.items()}
    tests = {
        place: sum(of[place] is not None and is_judged(of[place]) for of in found.values())
        for place in ("start", "end", "equal_flops")
    }

    def judged(name: str, point: dict[str, Any] | None, place: str) -> dict[str, Any] | None:
        # With equal FLOPs the two arms have read different data, so a seed does not give both arms the same data
        # order. The pooled spread does not apply, and `judge` uses only the spread of this difference.
        spread = spreads[arms[name].parent == UNTRAINED].get(place)
        return None if point is None else judge(point, spread, margin, max(tests[place], 1))

    for name, of in found.items():
        of["along"] = [judged(name, point, "end" if point["tokens"] else "start") for point in of["along"]]
        of |= {place: judged(name, of[place], place) for place in tests}
        of |= {"reference": references[name], "better_from": better_from(of["along"]) if of["end"] else None}
    return {"differences": found, "tests": tests}


def _difference(arm: ArmRecord, reference: ArmRecord) -> dict[str, Any]:
    """Compare an arm with its reference after equal tokens. If FLOPs per token differ, compare at equal FLOPs, too."""
    along = [
        {"tokens": tokens, **difference_of_arms(seeds, reference.scores[tokens])}
        for tokens, seeds in arm.scores.items()
        if arm.is_scored_with(reference, tokens)
    ]
    trained = [point for point in along if point["tokens"]]
    is_other = arm.flops_per_token != reference.flops_per_token
    return {
        "start": along[0] if along and not along[0]["tokens"] else None,
        "along": along,
        "end": trained[-1] if trained else None,
        "equal_flops": _with_equal_flops(arm, reference) if is_other else None,
    }


def _with_equal_flops(arm: ArmRecord, reference: ArmRecord) -> dict[str, Any] | None:
    """Compare an arm with its reference at the arm's last point whose FLOPs lie on the reference's curve.

    Between two points of the reference's curve, each document's score is interpolated linearly in the logarithm of the
    tokens.

    Args:
        arm: arm to compare.
        reference: arm to compare with.

    Returns:
        Result of `difference_of_arms`, with `tokens`, `reference_tokens` and `flops_ratio`. The ratio is 1
        unless the end of the reference was used instead of a point close to it (`FLOPS_APART`). The result is None if
        nothing can be compared.
    """
    ratio = arm.flops_per_token / reference.flops_per_token
    first = min((tokens for tokens in reference.scores if tokens), default=0)
    for tokens in sorted(filter(None, arm.scores), reverse=True):
        its = tokens * ratio
        if abs(its / reference.tokens - 1) < FLOPS_APART:
            its = reference.tokens
        if first <= its <= max(reference.scores) and arm.is_comparable(tokens, reference, its):
            reference_sums = sums_after(its, reference.scores)
            if set(reference_sums) & set(arm.scores[tokens]):
                difference = difference_of_arms(arm.scores[tokens], reference_sums)
                return {"tokens": tokens, "reference_tokens": its, "flops_ratio": tokens * ratio / its, **difference}
    return None


def _sources(seeds: Mapping[int, Sums]) -> dict[str, dict[str, Any]]:
    """Return each source's score at the last step: the mean over seeds and its interval."""
    by_seed = [by_source(sums) for sums in seeds.values()]
    return {source: mean_of([one[source]["value"] for one in by_seed]) for source in by_seed[0]}
