"""The table of a grid of ablations: what each arm reaches, what it differs by, and how sure that is."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.arms import ROUNDING, better_from, difference_of_arms, mean_of_seeds
from nemo_upcycle.evaluation.heldout import Sums, document_sums
from nemo_upcycle.reporting.markdown import number, section, table, with_error
from nemo_upcycle.utils.files import read_json, write_json


@dataclass(frozen=True)
class ArmRecord:
    """What an arm's trainings left.

    Args:
        name: of the arm.
        tokens_per_step: of a step.
        steps: of its trainings.
        scores: by step and seed, the sums of the held-out documents. What was no number is not there.
        last: by seed, the last step's line of metrics.
    """

    name: str
    tokens_per_step: int
    steps: int
    scores: dict[int, dict[int, Sums]]
    last: dict[int, dict[str, Any]]

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
    found: dict[str, ArmRecord] = {}
    for cell, about in described["cells"].items():
        arm = about["arm"]
        record = found.setdefault(arm, ArmRecord(arm, about["tokens_per_step"], about["steps"], {}, {}))
        for path in (run_dir / cell / "evaluation").glob("step=*.json"):
            step = int(path.stem.removeprefix("step="))
            record.scores.setdefault(step, {})[about["seed"]] = document_sums(read_json(path))
        lines = [json.loads(line) for line in (run_dir / cell / "metrics.jsonl").read_text().splitlines()]
        record.last[about["seed"]] = next(line for line in reversed(lines) if "loss" in line)
    return found


def compare_arms(arms: Mapping[str, ArmRecord], described: Mapping[str, Any]) -> dict[str, Any]:
    """Return every number of the table.

    Args:
        arms: from `read_arms`.
        described: of the grid's plan.

    Returns:
        `arms` (name -> `tokens`, `bits_per_byte` and `start` with their errors over seeds, `curve` by tokens,
        `dropped` share of token slots, `load_cv`) and `differences` (name -> `reference`, at the `end` what
        `difference_of_arms` returns, at the `start` likewise, and `better_from` tokens; of arms of equal steps).
    """
    values: dict[str, Any] = {"arms": {}, "differences": {}}
    for name, arm in arms.items():
        missing = sorted(set(arm.last) - set(arm.final))
        if len(missing) == len(arm.last):
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
            "tokens": arm.steps * arm.tokens_per_step,
            "bits_per_byte": _mean(arm.final),
            "start": _mean(arm.scores[0]),
            "curve": {step * arm.tokens_per_step: _mean(arm.scores[step]) for step in sorted(arm.scores)},
            **_routers(list(arm.last.values())),
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
    return values


def _mean(seeds: Mapping[int, Sums]) -> dict[str, float | None]:
    value, stderr = mean_of_seeds(seeds)
    return {"value": value, "stderr": stderr}


def _routers(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return what the routers did at the last step, the mean over layers and seeds; nothing of a dense arm."""
    kept = [line["router"] for line in lines if "router" in line]
    found = {}
    for name in ("dropped", "load_cv", "load_entropy", "dead_experts", "expert_distance"):
        numbers = [value for router in kept for value in router.get(name, []) if value is not None]
        if numbers:
            found[name] = statistics.fmean(numbers)
    return found


def write_table(run_dir: Path, name: str, described: Mapping[str, Any]) -> Path:
    """Write `table/table.md`, `table/table.json` and `table/curves.png`.

    Args:
        run_dir: the grid's folder, whose trainings are finished.
        name: of the grid.
        described: of the grid's plan.

    Returns:
        The table's path.
    """
    from nemo_upcycle.reporting.grid_figures import curves_figure

    folder = run_dir / "table"
    folder.mkdir(exist_ok=True)
    values = compare_arms(read_arms(run_dir, described), described)
    write_json(folder / "table.json", {"grid": name, "about": described["about"], **values})
    curves_figure(values).savefig(folder / "curves.png", dpi=150)
    path = folder / "table.md"
    path.write_text(render_table(name, described["about"], values), encoding="utf-8")
    return path


def render_table(name: str, about: str, values: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    rows = []
    for arm, found in values["arms"].items():
        routers = [number(found.get(key), 3) for key in ("dropped", "load_cv")]
        rows.append(
            [
                arm,
                f"{found['tokens']:,}",
                with_error(**found["start"]),
                with_error(**found["bits_per_byte"]),
                *routers,
                found["about"],
            ]
        )
    header = ["arm", "tokens", "bits per byte at step 0", "at the end", "dropped", "load CV", "what it is"]
    differences = [
        [
            f"{arm} - {found['reference']}",
            _with_verdict(found["start"]),
            _with_verdict(found["end"]),
            number(found["end"]["stderr_documents"], 2),
            number(found["end"]["stderr_seeds"], 2),
            _from(found),
        ]
        for arm, found in values["differences"].items()
    ]
    seeds = max(len(found["seeds"]) for found in values["arms"].values())
    unscored = [f"{arm} of seed {seed}" for arm, found in values["arms"].items() for seed in found["unscored_seeds"]]
    parts = (
        f"# Grid {name}",
        f"{about}. {seeds} seeds an arm; ± is the standard error over seeds. Lower is better.",
        f"Not scored at the end, and left out: {', '.join(unscored)}." if unscored else "",
        section("Arms", table(header, rows), "![curves](curves.png)"),
        section(
            "Differences",
            table(
                ["difference", "at step 0", "at the end", "from documents", "from seeds", "better from"],
                differences,
            ),
            "At the same seeds, on the same documents, in bits per byte; ± joins the error that other documents"
            " would give (a jackknife over them) and that of other seeds. It is a tie where the 95 % interval (t)"
            f" holds 0, or the difference is below {ROUNDING:g}, which rounding makes.",
        ),
        "Every number: `table.json`.\n",
    )
    return "\n\n".join(part for part in parts if part)


def _with_verdict(found: Mapping[str, Any]) -> str:
    sign = "+" if found["difference"] > 0 else ""
    return f"{sign}{with_error(found['difference'], found['stderr'])} ({found['verdict']})"


def _from(found: Mapping[str, Any]) -> str:
    if "along" not in found:
        return "other steps"
    tokens = found["better_from"]
    return "-" if tokens is None else f"{tokens:,} tokens"
