"""The table of a grid of ablations: table.md, table.json and the figures beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.evaluation.arms import ROUNDING
from nemo_upcycle.reporting.grid import compare_arms, read_arms
from nemo_upcycle.reporting.markdown import number, section, table, with_error
from nemo_upcycle.utils.files import write_json


_DPI = 150
#: What the table says of the routers.
_ROUTERS = ("dropped", "load_cv", "expert_distance")


def write_table(run_dir: Path, name: str, described: Mapping[str, Any]) -> Path:
    """Write `table/table.md`, `table/table.json` and figures: `curves`, `routers` and `budgets`, where there are any.

    Args:
        run_dir: the grid's folder, whose trainings are finished.
        name: of the grid.
        described: of the grid's plan.

    Returns:
        The table's path.
    """
    from nemo_upcycle.reporting.grid_figures import budgets_figure, curves_figure, routers_figure

    folder = run_dir / "table"
    folder.mkdir(exist_ok=True)
    values = compare_arms(read_arms(run_dir, described), described)
    write_json(folder / "table.json", {"grid": name, "about": described["about"], **values})
    figures = {"curves": curves_figure(values), "routers": routers_figure(values), "budgets": budgets_figure(values)}
    for title, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{title}.png", dpi=_DPI)
    path = folder / "table.md"
    path.write_text(render_table(name, described["about"], values), encoding="utf-8")
    return path


def render_table(name: str, about: str, values: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    arms = values["arms"]
    seeds = max(len(found["seeds"]) for found in arms.values())
    unscored = [f"{arm} of seed {seed}" for arm, found in arms.items() for seed in found["unscored_seeds"]]
    parts = (
        f"# Grid {name}",
        f"{about}. {seeds} seeds an arm; ± is the standard error over seeds. Lower is better.",
        f"Not scored at the end, and left out: {', '.join(unscored)}." if unscored else "",
        _arms(arms),
        _differences(values["differences"]),
        _rankings(values["rankings"]),
        _budgets(values["budgets"], arms),
        _sources(arms),
        "Every number: `table.json`.\n",
    )
    return "\n\n".join(part for part in parts if part)


def _arms(arms: Mapping[str, Any]) -> str:
    rows = []
    for arm, found in arms.items():
        routers = (list(found["routers"].get(key, {}).values())[-1:] for key in _ROUTERS)
        rows.append(
            [
                arm,
                f"{found['tokens']:,}",
                number(found["flops"], 3),
                with_error(**found["start"]),
                with_error(**found["bits_per_byte"]),
                number(60 * found["rank_hours"], 3),
                *(number(last[0], 3) if last else "-" for last in routers),
                found["about"],
            ]
        )
    header = ["arm", "tokens", "FLOPs", "bits per byte at step 0", "at the end", "rank minutes"]
    routers_md = "![routers](routers.png)" if any(found["routers"] for found in arms.values()) else ""
    return section(
        "Arms",
        table([*header, "dropped", "load CV", "expert distance", "what it is"], rows),
        "FLOPs of training, counting full attention; minutes of the training steps times ranks, without start,"
        " scoring and checkpoints. Of the routers the last step: token slots dropped, the experts' load (standard"
        " deviation over mean), distance of the experts from their mean, relative; means over layers and seeds.",
        "![curves](curves.png)",
        routers_md,
    )


def _differences(differences: Mapping[str, Any]) -> str:
    if not differences:
        return ""
    header = ["difference", "at step 0", "at the last common step"]
    rows = [
        [
            f"{arm} - {found['reference']}",
            _with_verdict(found["start"]),
            _with_verdict(found["end"]),
            number(found["end"]["stderr_documents"], 2),
            number(found["end"]["stderr_seeds"], 2),
            _from(found["better_from"]),
            _equal_flops(found.get("equal_flops")),
        ]
        for arm, found in differences.items()
    ]
    return section(
        "Differences",
        table([*header, "from documents", "from seeds", "better from", "with equal FLOPs"], rows),
        "At the same seeds, on the same documents, in bits per byte, after equal tokens; ± joins the error that"
        " other documents would give (a jackknife over them) and that of other seeds. It is a tie where the 95 %"
        " interval (t)"
        f" holds 0, or the difference is below {ROUNDING:g}, which rounding makes.",
    )


def _with_verdict(found: Mapping[str, Any]) -> str:
    sign = "+" if found["difference"] > 0 else ""
    return f"{sign}{with_error(found['difference'], found['stderr'])} ({found['verdict']})"


def _from(tokens: int | None) -> str:
    return "-" if tokens is None else f"{tokens:,} tokens"


def _equal_flops(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    tokens = f"{found['tokens']:,} tokens for {found['reference_tokens']:,}"
    return f"{_with_verdict(found)}: {tokens}, {found['flops_ratio']:.3f} times the FLOPs"


def _rankings(rankings: list[Mapping[str, Any]]) -> str:
    tables = []
    for ranking in rankings:
        rows = [
            [entry["arm"], f"{entry['value']:.4f}", _with_verdict(entry["to_best"]) if entry["to_best"] else "best"]
            for entry in ranking["arms"]
        ]
        tables.append(table([f"after {ranking['tokens']:,} tokens", "bits per byte", "to the best"], rows))
    if not tables:
        return ""
    about = (
        "A tie with the best shares its place. The intervals hold for all pairs of arms in a table at once (Tukey's),"
        " with the spread from seed to seed pooled over the arms: an arm may be a tie here and differ from its"
        " reference above."
    )
    return section("Ranking", *tables, about)


def _budgets(budgets: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    """Return what some arms reach with each budget, and what that is worth in the first one's training."""
    if not budgets:
        return ""
    first, *others = budgets
    tables = []
    for arm in others:
        rows = [
            [
                f"{entry['tokens']:,}",
                with_error(its["value"], its["stderr"]),
                with_error(entry["value"], entry["stderr"]),
                f"{entry['value'] - its['value']:+.4f}",
                _worth(entry, arms[first]["curve"]),
                "-" if entry["worth_rank_hours"] is None else number(60 * entry["worth_rank_hours"], 3),
            ]
            for entry, its in zip(budgets[arm], budgets[first], strict=True)
        ]
        header = ["tokens", first, arm, "gain", f"tokens of {first} for as much", "rank minutes of it"]
        tables.append(table(header, rows))
    return section(
        "Budgets",
        *tables,
        f"Tokens that {first} needs for the same: between the points of its curve bits per byte are taken to be linear"
        " in the logarithm of the tokens; nothing is said beyond them.",
        "![budgets](budgets.png)",
    )


def _worth(entry: Mapping[str, Any], curve: Mapping[int, Any]) -> str:
    """Return how many tokens of the first arm's curve what was reached is worth."""
    if entry["worth_tokens"] is not None:
        return f"{entry['worth_tokens']:,.0f} ({entry['worth_tokens'] / entry['tokens']:.2f} times)"
    longest = max(curve)
    return f"more than {longest:,}" if entry["value"] < curve[longest]["value"] else "not known"


def _sources(arms: Mapping[str, Any]) -> str:
    names = list(next(iter(arms.values()))["sources"])
    if len(names) < 2:
        return ""
    rows = [[arm, *(with_error(**found["sources"][name]) for name in names)] for arm, found in arms.items()]
    return section("By source", table(["bits per byte at the end", *names], rows))
