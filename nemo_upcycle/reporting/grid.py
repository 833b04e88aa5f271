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
        `curve` by tokens, `sources` at the end, `routers` by tokens), `differences` (name -> `reference`, at the `end`
        what `difference_of_arms` returns, at the `start` likewise, and `better_from` tokens; of arms of equal steps),
        `rankings` (`rank_arms` of the arms of each number of tokens) and `budgets` (family -> its arms; the later
        families' have `worth_tokens` and `worth_rank_hours` of the first one's training, to reach the same).
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
        arm, reference = arms[name], arms[other]
        found = {
            "reference": other,
            "start": difference_of_arms(arm.scores[0], reference.scores[0]),
            "end": difference_of_arms(arm.final, reference.final),
        }
        if arm.steps == reference.steps:
            common = sorted(set(arm.scores) & set(reference.scores))
            along = {
                step * arm.tokens_per_step: difference_of_arms(arm.scores[step], reference.scores[step])
                for step in common
            }
            found |= {"along": along, "better_from": better_from(along)}
        values["differences"][name] = found
    values["rankings"] = _rankings(arms)
    values["budgets"] = _budgets(described.get("budgets", {}), values["arms"])
    return values


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
    """Rank the arms of each number of tokens, the longest list first."""
    lengths: dict[int, dict[str, Mapping[int, Sums]]] = defaultdict(dict)
    for name, arm in arms.items():
        lengths[arm.tokens][name] = arm.final
    rankings = [{"tokens": tokens, "arms": rank_arms(group)} for tokens, group in lengths.items() if len(group) > 1]
    return sorted(rankings, key=lambda ranking: -len(ranking["arms"]))


def _budgets(families: Mapping[str, list[str]], arms: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return what each family reaches with each budget, and what that is worth in the first family's training."""
    found = {
        family: [
            {"arm": name, "tokens": arms[name]["tokens"], "flops": arms[name]["flops"], **arms[name]["bits_per_byte"]}
            for name in names
        ]
        for family, names in families.items()
    }
    if not found:
        return {}
    first, *others = found.values()
    reached = {entry["tokens"]: entry["value"] for entry in first}
    longest = max((arms[entry["arm"]] for entry in first), key=lambda arm: arm["tokens"])
    for entry in (entry for family in others for entry in family):
        tokens = tokens_to_reach(entry["value"], reached)
        entry["worth_tokens"] = tokens
        entry["worth_rank_hours"] = None if tokens is None else tokens * longest["rank_hours"] / longest["tokens"]
    return found
