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
        tokens_per_step: of a step.
        steps: of its trainings.
        scores: by step and seed, the sums of the held-out documents. What was no number is not there.
        lines: by seed, the lines of metrics of its steps.
        flops_per_token: of training, full attention.
        rank_hours: of the steps, on average over the seeds.
    """

    name: str
    tokens_per_step: int
    steps: int
    scores: dict[int, dict[int, Sums]]
    lines: dict[int, list[dict[str, Any]]]
    flops_per_token: float
    rank_hours: float

    @property
    def tokens(self) -> int:
        """Of a whole training."""
        return self.steps * self.tokens_per_step

    @property
    def step_flops(self) -> float:
        """Of a step."""
        return self.tokens_per_step * self.flops_per_token

    @property
    def final(self) -> dict[int, Sums]:
        """By seed, what the last step reached."""
        return self.scores.get(self.steps, {})


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
            scores[int(path.stem.removeprefix("step="))][about["seed"]] = document_sums(read_json(path))
        lines[about["seed"]] = read_curve(run_dir / cell / "metrics.jsonl").steps
        settings = read_json(run_dir / cell / "training.json")
    hours = [sum(line["seconds"] for line in steps) * settings["ranks"] / 3600 for steps in lines.values()]
    flops = settings["flops_per_token"]["full"]
    return ArmRecord(
        arm, about["tokens_per_step"], about["steps"], dict(scores), lines, flops, statistics.fmean(hours)
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
        missing = sorted(set(arm.lines) - set(arm.final))
        if not arm.final:
            raise UpcycleError(
                f"arm {name}",
                got="no score at its last step",
                expected="one of a seed",
                fix=f"see the logs of {name}-seed*",
            )
        values["arms"][name] = {
            "about": described["arms"][name],
            "seeds": sorted(arm.final),
            "unscored_seeds": missing,
            "tokens": arm.tokens,
            "flops": arm.tokens * arm.flops_per_token,
            "rank_hours": arm.rank_hours,
            "bits_per_byte": _mean(arm.final),
            "start": _mean(arm.scores[0]),
            "curve": {step * arm.tokens_per_step: _mean(arm.scores[step]) for step in sorted(arm.scores)},
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
        step * arm.tokens_per_step: difference_of_arms(arm.scores[step], reference.scores[step])
        for step in sorted(set(arm.scores) & set(reference.scores))
    }
    found = {"start": along[0], "along": along, "end": along[max(along)], "better_from": better_from(along)}
    if arm.flops_per_token != reference.flops_per_token and (pair := _equal_flops(arm, reference)):
        mine, its = pair
        found["equal_flops"] = {
            "tokens": mine * arm.tokens_per_step,
            "reference_tokens": its * reference.tokens_per_step,
            "flops_ratio": mine * arm.step_flops / (its * reference.step_flops),
            **difference_of_arms(arm.scores[mine], reference.scores[its]),
        }
    return found


def _equal_flops(arm: ArmRecord, reference: ArmRecord) -> tuple[int, int] | None:
    """Return the last steps of the two that took as many FLOPs, up to `FLOPS_APART`; None where none did."""
    pairs = [
        (mine, its)
        for mine in arm.scores
        for its in reference.scores
        if its and abs(mine * arm.step_flops / (its * reference.step_flops) - 1) < FLOPS_APART
    ]
    return max(pairs, default=None)


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
        reached = {name: arm.scores.get(tokens // arm.tokens_per_step, {}) for name, arm in arms.items()}
        there = {name: seeds for name, seeds in reached.items() if seeds}
        if len(there) > 1:
            rankings.append({"tokens": tokens, "arms": rank_arms(there)})
    return sorted(rankings, key=lambda ranking: -len(ranking["arms"]))


def _budgets(named: Mapping[str, Any] | None, arms: Mapping[str, ArmRecord]) -> dict[str, list[dict[str, Any]]]:
    """Return what some arms reach with each budget, and what that is worth in the first one's training."""
    if not named:
        return {}
    found = {
        name: [
            {
                "tokens": step * arms[name].tokens_per_step,
                "flops": step * arms[name].step_flops,
                **_mean(arms[name].scores[step]),
            }
            for step in named["steps"]
        ]
        for name in named["arms"]
    }
    first, *others = named["arms"]
    reached = {
        step * arms[first].tokens_per_step: mean_of_seeds(seeds)[0]
        for step, seeds in arms[first].scores.items()
        if step
    }
    for entry in (entry for name in others for entry in found[name]):
        tokens = tokens_to_reach(entry["value"], reached)
        hours_of_token = arms[first].rank_hours / arms[first].tokens
        entry["worth_tokens"] = tokens
        entry["worth_rank_hours"] = None if tokens is None else tokens * hours_of_token
    return found
