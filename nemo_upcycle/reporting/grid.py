"""What a grid of ablations has found: what each arm reaches, what it differs by, and how sure that is."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.arms import (
    better_from,
    difference_of_arms,
    mean_and_stderr,
    mean_of_seeds,
    rank_arms,
    tokens_to_reach,
)
from nemo_upcycle.evaluation.heldout import Sums, by_source, document_sums
from nemo_upcycle.reporting.results import summarise_router
from nemo_upcycle.reporting.run_folder import read_curve
from nemo_upcycle.utils.files import read_json


#: What is kept of the routers.
ROUTER_METRICS = ("load_cv", "load_entropy", "dropped", "dead_experts", "expert_distance")
#: Two numbers of FLOPs that differ by less count as equal.
FLOPS_APART = 0.02


@dataclass(frozen=True)
class ArmRecord:
    """What an arm's trainings left.

    Args:
        name: of the arm.
        tokens: of a whole training.
        scores: by tokens and seed, the sums of the held-out documents. What was no number is not there.
        lines: by seed, the lines of metrics of its steps.
        flops_per_token: of training, full attention.
        rank_hours: of the steps, on average over the seeds.
        is_rate_constant: whether the learning rate does not fall, so that a point of the curve is a training's end.
    """

    name: str
    tokens: int
    scores: dict[int, dict[int, Sums]]
    lines: dict[int, list[dict[str, Any]]]
    flops_per_token: float
    rank_hours: float
    is_rate_constant: bool

    @property
    def final(self) -> dict[int, Sums]:
        """By seed, what the last step reached."""
        return self.scores.get(self.tokens, {})


def read_arms(run_dir: Path, described: Mapping[str, Any]) -> dict[str, ArmRecord]:
    """Return what the trainings of a grid left, by arm.

    Args:
        run_dir: the grid's folder.
        described: of the grid's plan.
    """
    cells: dict[str, list[str]] = defaultdict(list)
    for cell, about in described["cells"].items():
        cells[about["arm"]].append(cell)
    return {arm: _read_arm(run_dir, arm, {name: described["cells"][name] for name in cells[arm]}) for arm in cells}


def _read_arm(run_dir: Path, arm: str, cells: Mapping[str, Mapping[str, Any]]) -> ArmRecord:
    scores: dict[int, dict[int, Sums]] = defaultdict(dict)
    lines = {}
    for cell, about in cells.items():
        for path in (run_dir / cell / "evaluation").glob("step=*.json"):
            tokens = int(path.stem.removeprefix("step=")) * about["tokens_per_step"]
            scores[tokens][about["seed"]] = document_sums(read_json(path))
        lines[about["seed"]] = read_curve(run_dir / cell / "metrics.jsonl").steps
        settings = read_json(run_dir / cell / "training.json")
    hours = [sum(line["seconds"] for line in steps) * settings["ranks"] / 3600 for steps in lines.values()]
    return ArmRecord(
        name=arm,
        tokens=about["steps"] * about["tokens_per_step"],
        scores=dict(sorted(scores.items())),
        lines=lines,
        flops_per_token=settings["flops_per_token"]["full"],
        rank_hours=statistics.fmean(hours),
        is_rate_constant=about["is_rate_constant"],
    )


def compare_arms(arms: Mapping[str, ArmRecord], described: Mapping[str, Any]) -> dict[str, Any]:
    """Return every number of the table.

    Args:
        arms: from `read_arms`.
        described: of the grid's plan.

    Returns:
        `arms` (name -> `tokens`, `flops`, `rank_hours`, `bits_per_byte` and `start` with their errors over seeds,
        `curve` by tokens, `sources` at the end, `routers` by tokens), `differences` (name -> `reference`; at the
        `start` what `difference_of_arms` returns, `along` the tokens that both have, at the `end` of these;
        `better_from` tokens; `equal_flops`, where a token costs the two different FLOPs), `rankings` (`rank_arms` of
        all arms after the tokens of each whole training) and `budgets` (arm -> what it reaches with each; the later
        arms' have `worth_tokens` and `worth_rank_hours` of the first one's training, to reach the same).
    """
    values: dict[str, Any] = {"arms": {}, "differences": {}}
    for name, arm in arms.items():
        for when, tokens in (("first", 0), ("last", arm.tokens)):
            if not arm.scores.get(tokens):
                raise UpcycleError(
                    f"arm {name}",
                    got=f"no score at its {when} step",
                    expected="one of a seed",
                    fix=f"see the logs of {name}-seed*",
                )
        values["arms"][name] = {
            "about": described["arms"][name],
            "seeds": sorted(arm.final),
            "unscored_seeds": sorted(set(arm.lines) - set(arm.final)),
            "tokens": arm.tokens,
            "flops": arm.tokens * arm.flops_per_token,
            "rank_hours": arm.rank_hours,
            "bits_per_byte": _mean(arm.final),
            "start": _mean(arm.scores[0]),
            "curve": {tokens: _mean(seeds) for tokens, seeds in arm.scores.items()},
            "sources": _sources(arm.final),
            "routers": _routers(arm),
        }
    for name, other in described["references"].items():
        values["differences"][name] = {"reference": other, **_difference(arms[name], arms[other])}
    values["rankings"] = _rankings(arms)
    values["budgets"] = _budgets(described.get("budgets"), arms)
    return values


def _difference(arm: ArmRecord, reference: ArmRecord) -> dict[str, Any]:
    """Compare an arm with its reference after equal tokens, and with equal FLOPs."""
    along = {
        tokens: difference_of_arms(seeds, reference.scores[tokens])
        for tokens, seeds in arm.scores.items()
        if set(seeds) & set(reference.scores.get(tokens, {}))
    }
    if not along:
        raise UpcycleError(
            f"arms {arm.name} and {reference.name}",
            got="no seed and number of tokens at which both were scored",
            expected="one",
            fix="see the logs of both; with other batches, choose steps after which their tokens are equal",
        )
    found = {"start": along[min(along)], "along": along, "end": along[max(along)], "better_from": better_from(along)}
    if arm.flops_per_token != reference.flops_per_token and (pair := _equal_flops(arm, reference)):
        mine, its = pair
        found["equal_flops"] = {
            "tokens": mine,
            "reference_tokens": its,
            "flops_ratio": _flops_ratio(arm, mine, reference, its),
            **difference_of_arms(arm.scores[mine], reference.scores[its]),
        }
    return found


def _flops_ratio(arm: ArmRecord, tokens: int, reference: ArmRecord, its_tokens: int) -> float:
    return tokens * arm.flops_per_token / (its_tokens * reference.flops_per_token)


def _equal_flops(arm: ArmRecord, reference: ArmRecord) -> tuple[int, int] | None:
    """Return the latest tokens after which the two took as many FLOPs; None where they never did.

    Points within a training count where the learning rate does not fall; else the ends alone.
    """
    are_constant = arm.is_rate_constant and reference.is_rate_constant
    pairs = [
        (mine, -abs(_flops_ratio(arm, mine, reference, its) - 1), its)
        for mine in (arm.scores if are_constant else [arm.tokens])
        for its in (reference.scores if are_constant else [reference.tokens])
        if its and set(arm.scores[mine]) & set(reference.scores[its])
    ]
    near = [(mine, apart, its) for mine, apart, its in pairs if -apart < FLOPS_APART]
    return (max(near)[0], max(near)[2]) if near else None


def _mean(seeds: Mapping[int, Sums]) -> dict[str, float | None]:
    value, stderr = mean_of_seeds(seeds)
    return {"value": value, "stderr": stderr}


def _sources(seeds: Mapping[int, Sums]) -> dict[str, dict[str, Any]]:
    """Return by source what the last step reached, the mean over seeds and its error."""
    found = [by_source(sums) for sums in seeds.values()]
    return {
        source: dict(zip(("value", "stderr"), mean_and_stderr([one[source]["value"] for one in found]), strict=True))
        for source in found[0]
    }


def _routers(arm: ArmRecord) -> dict[str, dict[int, float]]:
    """Return what the routers did, by tokens: the mean over layers and seeds; nothing of a dense arm."""
    kept: dict[str, dict[int, list[float]]] = {}
    for line in (line for lines in arm.lines.values() for line in lines if line.get("router")):
        for name, value in summarise_router(line["router"]).items():
            kept.setdefault(name, {}).setdefault(line["tokens"], []).append(value)
    return {
        name: {tokens: statistics.fmean(numbers) for tokens, numbers in sorted(steps.items())}
        for name, steps in kept.items()
        if name in ROUTER_METRICS
    }


def _rankings(arms: Mapping[str, ArmRecord]) -> list[dict[str, Any]]:
    """Rank the arms after the tokens of each whole training, the longest list first."""
    rankings = []
    for tokens in dict.fromkeys(arm.tokens for arm in arms.values()):
        reached = {name: arm.scores[tokens] for name, arm in arms.items() if tokens in arm.scores}
        seeds = set.intersection(*(set(scores) for scores in reached.values()))
        if len(reached) > 1 and seeds:
            rankings.append({"tokens": tokens, "arms": rank_arms(reached)})
    return sorted(rankings, key=lambda ranking: -len(ranking["arms"]))


def _budgets(named: Mapping[str, Any] | None, arms: Mapping[str, ArmRecord]) -> dict[str, list[dict[str, Any]]]:
    """Return what some arms reach with each budget, and what that is worth in the first one's training."""
    if not named:
        return {}
    common = [tokens for tokens in named["tokens"] if all(tokens in arms[name].scores for name in named["arms"])]
    found = {
        name: [
            {"tokens": tokens, "flops": tokens * arms[name].flops_per_token, **_mean(arms[name].scores[tokens])}
            for tokens in common
        ]
        for name in named["arms"]
    }
    first, *others = (arms[name] for name in named["arms"])
    reached = {tokens: mean_of_seeds(seeds)[0] for tokens, seeds in first.scores.items() if tokens}
    for entry in (entry for other in others for entry in found[other.name]):
        tokens = tokens_to_reach(entry["value"], reached)
        entry["worth_tokens"] = tokens
        entry["worth_rank_hours"] = None if tokens is None else tokens * first.rank_hours / first.tokens
    return found
