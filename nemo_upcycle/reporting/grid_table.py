"""The table of a grid of ablations: its evidence, table.md, table.json and the figure beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.reporting.grid import arms_of, compare_arms
from nemo_upcycle.reporting.grid_evidence import EVIDENCE, PLAN, collect_evidence, read_evidence, write_evidence
from nemo_upcycle.reporting.markdown import mean_with_interval, number, section, table, with_verdict
from nemo_upcycle.reporting.router_metrics import ROUTER_METRICS
from nemo_upcycle.reporting.sections import overlap
from nemo_upcycle.utils.files import MARKER, read_json, read_text, whole_file, write_json


#: `write_grid` writes between these lines of a page.
BEGIN, END = "<!-- from the evidence: begin -->", "<!-- from the evidence: end -->"


def is_grid(folder: Path) -> bool:
    """Return whether a folder is that of a grid, or holds a grid's evidence."""
    return (folder / PLAN).is_file() or (folder / EVIDENCE).is_file()


def write_grid(folder: Path) -> Path:
    """Write the table of a grid again.

    Args:
        folder: folder of a grid, whose `table/` is written from its finished trainings; or a folder with its evidence
            alone: the table is written beside it, or between the two markers of the page `FOLDER.md`, if there is one.

    Returns:
        The path of the table, or of the page.

    Raises:
        UpcycleError: a file is missing or damaged, or a page lacks its markers.

    Example:
        >>> write_grid(Path("docs/results/laptop"))  # doctest: +SKIP
        PosixPath('docs/results/laptop.md')
    """
    if (folder / PLAN).is_file():
        plan = read_json(folder / PLAN)
        return write_table(folder, plan["name"], _finished(folder, plan["described"]))
    page = folder.resolve().with_suffix(".md")
    if not page.is_file():
        return _write(folder / "table.md", draw_table(folder))
    before, begin, rest = read_text(page).partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UpcycleError(str(page), got="no such lines", expected=f"{BEGIN} and {END}", fix="write both into it")
    table = draw_table(folder).partition("\n\n")[2]
    sections = re.sub(r"(!\[\w+\]\()(\w+\.png\))", rf"\1{page.stem}/\2", table)
    return _write(page, f"{before}{BEGIN}\n\n{sections}\n{END}{after}")


def _finished(run_dir: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of a grid's plan the trainings that are finished, and name the others as `missing`.

    Raises:
        UpcycleError: none is.
    """
    cells = {name: cell for name, cell in described["cells"].items() if (run_dir / name / MARKER).is_file()}
    if not cells:
        fix = "run nemo upcycle ablate with this folder as dir"
        raise UpcycleError(str(run_dir), got="no finished training", expected="one or more", fix=fix)
    missing = [name for name in described["cells"] if name not in cells]
    if not missing:
        return dict(described)
    arms = {cell["arm"] for cell in cells.values()}
    return {
        **described,
        "cells": cells,
        "arms": {name: about for name, about in described["arms"].items() if name in arms},
        "references": {one: other for one, other in described["references"].items() if {one, other} <= arms},
        "missing": missing,
    }


def _write(path: Path, text: str) -> Path:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def write_table(run_dir: Path, name: str, described: Mapping[str, Any]) -> Path:
    """Write `table/`: the evidence of a grid, the files of `draw_table`, and `table.md`.

    Args:
        run_dir: the grid's folder, whose trainings are finished.
        name: the name of the grid.
        described: the `described` of the grid's plan.

    Returns:
        The table's path.
    """
    folder = run_dir / "table"
    write_evidence(folder / EVIDENCE, collect_evidence(run_dir, name, described))
    return _write(folder / "table.md", draw_table(folder))


def draw_table(folder: Path) -> str:
    """Write `table.json` and the figure of a grid; return the table.

    Args:
        folder: folder with the evidence of a grid; nothing else is read.

    Returns:
        The table as Markdown.
    """
    from nemo_upcycle.reporting.figures import png_of
    from nemo_upcycle.reporting.grid_figure import curves_figure

    evidence = read_evidence(folder / EVIDENCE)
    described = evidence["described"]
    values = {"grid": evidence["grid"], "about": described["about"], **compare_arms(arms_of(evidence), described)}
    values |= {"missing": described["missing"]} if described.get("missing") else {}
    if found := evidence.get("heldout_overlap"):  # not in older evidence
        values["heldout_overlap"] = found
    write_json(folder / "table.json", values, indent=None)  # with a line for each number, three times as large
    with whole_file(folder / "curves.png") as aside:
        aside.write_bytes(png_of(curves_figure(values)))
    return render_table(values)


def render_table(values: Mapping[str, Any]) -> str:
    """Return the table as Markdown.

    Args:
        values: result of `compare_arms`, with `grid`, `about` and, if known, `heldout_overlap`.
    """
    arms = values["arms"]
    counts = sorted({len(result["seeds"]) for result in arms.values()})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    unscored = [f"{arm} of seed {seed}" for arm, result in arms.items() for seed in result["unscored_seeds"]]
    parts = (
        f"# Grid {values['grid']}",
        f"{values['about']}. {seeds} seeds an arm; lower is better. ± is half of a 95 % interval (t); of what an arm"
        " reaches, over seeds.",
        f"Not scored at the end, and left out: {', '.join(unscored)}." if unscored else "",
        _missing(values.get("missing", [])),
        _arms(arms),
        _differences(values["differences"], values["margin"]),
        _rankings(values["rankings"]),
        _sources(arms),
        section("Held-out text", text) if (text := overlap(values.get("heldout_overlap"))) else "",
        f"Every number: `table.json`, made from `{EVIDENCE}`.\n",
    )
    return "\n\n".join(part for part in parts if part)


def _missing(names: list[str]) -> str:
    return f"Not finished, and left out: {', '.join(f'`{name}`' for name in names)}." if names else ""


def _arms(arms: Mapping[str, Any]) -> str:
    columns = {key: metric.column for key, metric in ROUTER_METRICS.items() if metric.column}
    rows = [
        [
            arm,
            f"{result['tokens']:,}",
            number(result["flops"], 3),
            mean_with_interval(result["start"]),
            mean_with_interval(result["bits_per_byte"]),
            number(60 * result["rank_hours"], 3),
            *(number(result["routers"][key][-1][1], 3) if key in result["routers"] else "-" for key in columns),
            result["about"],
        ]
        for arm, result in arms.items()
    ]
    header = ["arm", "tokens", "FLOPs", "bits per byte at step 0", "at the end", "rank minutes"]
    return section(
        "Arms",
        table([*header, *columns.values(), "what it is"], rows),
        "FLOPs of training, counting full attention. Minutes of the training steps times ranks, of each step the"
        " fastest seed: other work on the machine only adds. A first step counts as the average of the others; start,"
        " scoring and checkpoints do not count. Of the routers the last step: token slots dropped, the experts' load"
        " (standard deviation over mean), distance of the experts from their mean, relative; means over layers and"
        " seeds.",
        "![curves](curves.png)",
    )


def _differences(differences: Mapping[str, Any], margin: float) -> str:
    if not differences:
        return ""
    header = ["difference", "at step 0", "after equal tokens", "these tokens", "from documents", "from seeds"]
    rows = []
    for arm, difference in differences.items():
        end = difference["end"] or {}
        rows.append(
            [
                f"{arm} - {difference['reference']}",
                with_verdict(difference["start"]),
                with_verdict(difference["end"]),
                f"{end['tokens']:,}" if end else "-",
                number(end.get("stderr_documents"), 2),
                number(end.get("stderr_seeds"), 2),
                "-" if difference["better_from"] is None else f"{difference['better_from']:,} tokens",
                _equal_cost(difference.get("equal_flops"), "FLOPs"),
                _equal_cost(difference["equal_time"], "minutes"),
            ]
        )
    return section(
        "Differences",
        table([*header, "better from", "with equal FLOPs", "with equal minutes"], rows),
        "At the same seeds, on the same documents, in bits per byte. The 95 % interval joins the standard error that"
        " other documents would give (a jackknife over them) and that of other seeds; both stand beside it, at the"
        f" last tokens that can be compared. It is a tie where the whole interval lies within the margin of {margin:g}"
        " on both sides of 0, which is taken not to matter; not resolved where it holds 0 and goes beyond. Where a"
        " learning rate falls, the middle of a training is compared with that of one of the same steps and schedule"
        " alone (else: -). FLOPs and minutes are made equal between two points of the reference's curve, linear in the"
        " logarithm of the tokens.",
    )


def _equal_cost(point: Mapping[str, Any] | None, unit: str) -> str:
    if point is None:
        return "-"
    times = "" if abs(point["cost_ratio"] - 1) < 5e-4 else f", {point['cost_ratio']:.3f} times the {unit}"
    return f"{with_verdict(point)}: {point['tokens']:,} tokens for {point['reference_tokens']:,.0f}{times}"


def _rankings(rankings: list[Mapping[str, Any]]) -> str:
    tables = []
    for ranking in rankings:
        rows = [
            [entry["arm"], f"{entry['value']:.4f}", with_verdict(entry["to_best"]) if entry["to_best"] else "best"]
            for entry in ranking["arms"]
        ]
        title = f"after {ranking['tokens']:,} tokens" + (
            f" from {parent}" if (parent := ranking.get("parent")) else ""
        )
        tables.append(table([title, "bits per byte", "to the best"], rows))
    if not tables:
        return ""
    about = (
        "A tie with the best shares its place; what is not resolved may, too. The intervals hold for all pairs of arms"
        " in a table at once (Tukey's, 95 %), with the spread from seed to seed pooled over the arms: a verdict may"
        " differ from that above."
    )
    return section("Ranking", *tables, about)


def _sources(arms: Mapping[str, Any]) -> str:
    names = list(next(iter(arms.values()))["sources"])
    if len(names) < 2:
        return ""
    rows = [[arm, *(mean_with_interval(result["sources"][name]) for name in names)] for arm, result in arms.items()]
    return section("By source", table(["bits per byte at the end", *names], rows))
