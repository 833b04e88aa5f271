"""Compute the results of a grid of ablations: each arm's scores, its differences, and their intervals."""

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


#: The parent of arms from random weights.
UNTRAINED = "untrained"
#: Where the FLOPs of two trainings differ by less, their ends are compared.
FLOPS_APART = 0.02


@dataclass(frozen=True)
class ArmRecord:
    """Measurements from an arm's trainings.

    Args:
        name: name of the arm.
        steps: number of steps of a whole training.
        tokens_per_step: number of tokens of a step.
        schedule: schedule of the learning rate.
        is_rate_constant: whether each point equals the result of a whole training of that length, because the learning
            rate does not fall, or each point is the end of a training of its own.
        trained_seeds: seeds that were trained.
        ends: tokens of its trainings, of which a curve of lengths has several.
        scores: tokens -> seed -> sums of the held-out documents; values that were not a number are left out.
        routers: metric -> tokens -> mean over layers and seeds; empty for a dense arm.
        flops_per_token: FLOPs of a token in training, full attention.
        rank_seconds_per_token: seconds of the steps times ranks, over their tokens; for each step the fastest seed's,
            without the first step.
        parent: model that the arm starts from, in a grid whose arms have different parents.
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
        """Of a whole training."""
        return self.steps * self.tokens_per_step

    @property
    def final(self) -> dict[int, Sums]:
        """Seed -> scores of the last step."""
        return self.scores.get(self.tokens, {})

    def is_comparable(self, tokens: float, other: ArmRecord, its_tokens: float) -> bool:
        """Return whether a point of this arm's curve may be compared with one of another's: the only rule for it.

        A learning rate that falls makes the end of a training better than its middle: two points are compared where
        both are what a whole training of that length reaches, or as far on in trainings of one length and schedule.
        """
        schedules = [(arm.steps, arm.tokens_per_step, arm.schedule) for arm in (self, other)]
        are_ends = self._is_end(tokens) and other._is_end(its_tokens)
        return are_ends or (schedules[0] == schedules[1] and tokens == its_tokens)

    def is_scored_with(self, other: ArmRecord, tokens: int) -> bool:
        """Return whether both were scored after some tokens, at a seed of both, and are comparable there."""
        seeds = set(self.scores.get(tokens, {})) & set(other.scores.get(tokens, {}))
        return bool(seeds) and self.is_comparable(tokens, other, tokens)

    def _is_end(self, tokens: float) -> bool:
        """Return whether a training of so many tokens ends as this one is then."""
        return self.is_rate_constant or tokens in (0, self.tokens)


def arms_of(evidence: Mapping[str, Any]) -> dict[str, ArmRecord]:
    """Sort the evidence of a grid by arm.

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
    """Measure a token's time: of each step the fastest seed, since other work on a machine only adds.

    The first step, which compiles and allocates, is left out where there are more.
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
    """Return every number of the table.

    Points of two curves are compared where `ArmRecord.is_comparable` lets them; no key is a number, so that the
    values are the same after JSON. Where a mean is named it is what `mean_of_seeds` returns, and a difference what
    `judge` does.

    Args:
        arms: result of `arms_of`.
        described: the `described` of the grid's plan.

    Returns:
        `margin`; `arms` (name -> `tokens`, `flops`, `rank_hours`, the means `bits_per_byte` and `start`, `curve` (a
        mean and its `tokens` each), `sources` at the end, `routers` (metric -> pairs of tokens and value));
        `differences` (name -> `reference`; the difference at the `start`, `along` all `tokens` after which both were
        scored, at the `end` of these, and with `equal_flops`, each None where nothing can be compared; `better_from`
        tokens); and `tests` (`start`, `end` and `equal_flops` -> how many differences are judged together).
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
    """Pool the spread of an arm from seed to seed, at the `start` and at the `end` of whole trainings.

    Trainings from random weights spread wider than those from a parent: each kind has its own.
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
    """Compare arms with their references; the verdicts of a table hold together.

    Args:
        arms: all arms.
        references: arm -> the one that it is compared with.
        margin: bits per byte that do not matter.
        spreads: result of `_spreads` of the untrained arms (True) and of the others.
    """
    found = {name: _difference(arms[name], arms[other]) for name, other in references.items()}
    tests = {
        place: sum(of[place] is not None and is_judged(of[place]) for of in found.values())
        for place in ("start", "end", "equal_flops")
    }

    def judged(name: str, point: dict[str, Any] | None, place: str) -> dict[str, Any] | None:
        # With equal FLOPs the two have read other data, of which a seed's order is not common: its own spread counts.
        spread = spreads[arms[name].parent == UNTRAINED].get(place)
        return None if point is None else judge(point, spread, margin, max(tests[place], 1))

    for name, of in found.items():
        of["along"] = [judged(name, point, "end" if point["tokens"] else "start") for point in of["along"]]
        of |= {place: judged(name, of[place], place) for place in tests}
        of |= {"reference": references[name], "better_from": better_from(of["along"]) if of["end"] else None}
    return {"differences": found, "tests": tests}


def _difference(arm: ArmRecord, reference: ArmRecord) -> dict[str, Any]:
    """Compare an arm with its reference after equal tokens, and with equal FLOPs where a token costs others."""
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
    """Compare two arms at the last point of the first whose FLOPs lie on the curve of the reference.

    Between two points of the reference's curve its documents are taken to be linear in the logarithm of the tokens.

    Args:
        arm: compared.
        reference: arm to compare with.

    Returns:
        What `difference_of_arms` does, `tokens`, `reference_tokens` and `flops_ratio`, 1 but where the end of the
        reference is near (`FLOPS_APART`). None where nothing can be compared.
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
    """Return source -> score of the last step, the mean over seeds and its interval."""
    by_seed = [by_source(sums) for sums in seeds.values()]
    return {source: mean_of([one[source]["value"] for one in by_seed]) for source in by_seed[0]}
