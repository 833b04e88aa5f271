"""The table of an ablation grid: evidence, table.md, table.json and a figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.grid_statistics import ONE_SEED
from nemo_upcycle.evaluation.statistics import LEAST_SEEDS
from nemo_upcycle.reporting.grid import arms_of, compare_arms
from nemo_upcycle.reporting.grid_evidence import EVIDENCE, PLAN, collect_evidence, read_evidence, write_evidence
from nemo_upcycle.reporting.markdown import mean_with_interval, number, section, with_verdict
from nemo_upcycle.reporting.router_metrics import ROUTER_METRICS
from nemo_upcycle.reporting.sections import overlap
from nemo_upcycle.utils.command_line import COMMAND
from nemo_upcycle.utils.files import MARKER, read_json, read_text, whole_file, write_json
from nemo_upcycle.utils.writers import code, plain, table


#: Columns of a difference: two standard errors, and the smallest difference that can be detected.
_POWER = ("stderr over documents", "stderr over seeds", "smallest difference seen with 80 %")
#: The two lines of a page between which `write_grid` writes the table.
BEGIN, END = "<!-- from the evidence: begin -->", "<!-- from the evidence: end -->"


def is_grid(folder: Path) -> bool:
    """Return whether a folder is the folder of a grid, or holds a grid's evidence."""
    return (folder / PLAN).is_file() or (folder / EVIDENCE).is_file()


def write_grid(folder: Path) -> Path:
    """Write the table of a grid again.

    Args:
        folder: either the folder of a grid, whose `table/` is written from the finished trainings, or a folder that
            holds only the evidence. In the second case, the table is written between the two marker lines of the page
            `FOLDER.md` if this page exists, otherwise beside the evidence.

    Returns:
        The path of the table, or of the page.

    Raises:
        UpcycleError: a file is missing or damaged, or the page lacks its marker lines.

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
        raise UpcycleError(
            str(page), kind="missing", got=f"has no lines {BEGIN} and {END}", fix="write both lines into the page"
        )
    table = draw_table(folder).partition("\n\n")[2]
    sections = re.sub(r"(!\[\w+\]\()(\w+\.png\))", rf"\1{page.stem}/\2", table)
    return _write(page, f"{before}{BEGIN}\n\n{sections}\n{END}{after}")


def _finished(run_dir: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a grid's plan to the finished trainings, and list the other trainings as `missing`.

    Raises:
        UpcycleError: no training is finished.
    """
    cells = {name: cell for name, cell in described["cells"].items() if (run_dir / name / MARKER).is_file()}
    if not cells:
        typed = run_dir / COMMAND
        fix = "run the command of the grid again" + (f" (see {typed})" if typed.is_file() else "")
        raise UpcycleError(str(run_dir), kind="state", got="has no finished training", fix=fix)
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
    """Write the folder `table/`: the evidence of a grid, the files of `draw_table`, and `table.md`.

    Args:
        run_dir: folder of the grid, whose trainings are finished.
        name: name of the grid.
        described: entry `described` of the grid's plan.

    Returns:
        The path of `table.md`.
    """
    folder = run_dir / "table"
    write_evidence(folder / EVIDENCE, collect_evidence(run_dir, name, described))
    return _write(folder / "table.md", draw_table(folder))


def draw_table(folder: Path) -> str:
    """Write `table.json` and the figure of a grid, and return the table.

    Args:
        folder: folder with the evidence of a grid; no other file is read.

    Returns:
        The table as Markdown.
    """
    from nemo_upcycle.reporting.figures import png_of
    from nemo_upcycle.reporting.grid_figure import grid_figure

    evidence = read_evidence(folder / EVIDENCE)
    described = evidence["described"]
    values = {"grid": evidence["grid"], "about": described["about"], **compare_arms(arms_of(evidence), described)}
    values |= {"missing": described["missing"]} if described.get("missing") else {}
    if found := evidence.get("heldout_overlap"):  # older evidence lacks this entry
        values["heldout_overlap"] = found
    write_json(folder / "table.json", values, indent=None)  # indentation makes the file three times as large
    with whole_file(folder / "curves.png") as aside:
        aside.write_bytes(png_of(grid_figure(values)))
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
        f"# Grid {plain(values['grid'])}",
        f"{plain(values['about'])}. Seeds per arm: {seeds}. Lower is better. ± is half of a 95 % interval (t) over the"
        " seeds of an arm.",
        f"Omitted because they were not scored at the end: {plain(', '.join(unscored))}." if unscored else "",
        _missing(values.get("missing", [])),
        _arms(arms),
        _differences(values),
        _sources(arms),
        section("Held-out text", text) if (text := overlap(values.get("heldout_overlap"))) else "",
        f"Every number: `table.json`, made from `{EVIDENCE}`.\n",
    )
    return "\n\n".join(part for part in parts if part)


def _missing(names: list[str]) -> str:
    return f"Omitted because they did not finish: {', '.join(map(code, names))}." if names else ""


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
    header = ["arm", "tokens", "FLOPs", "bits per byte at step 0", "bits per byte at the end", "rank-minutes"]
    return section(
        "Arms",
        table([*header, *columns.values(), "description"], rows),
        "FLOPs are those of training, with full attention. Rank-minutes are minutes of the training steps times ranks."
        " Each step takes its time from the fastest seed, because other work on the machine can only add time. The"
        " first step counts as the average of the others. Start, scoring and checkpoints do not count. The last"
        " columns describe the routers at the last step, as means over layers and seeds: token slots dropped, expert"
        " load (standard deviation over mean), and relative distance of the experts from their mean.",
        "![curves](curves.png)",
    )


def _differences(values: Mapping[str, Any]) -> str:
    differences, margin = values["differences"], values["margin"]
    tables = []
    if any(of["end"] for of in differences.values()):
        header = [
            "after equal tokens",
            "difference",
            "tokens",
            "better from",
            *_POWER,
            f"seeds needed to see {margin:g}",
        ]
        rows = [
            [name, with_verdict(end), f"{end['tokens']:,}", _tokens(of["better_from"]), *_power(end), _seeds(end)]
            for name, of in _named(differences)
            if (end := of["end"])
        ]
        tables += [table(header, rows), _seen([of["end"] for of in differences.values() if of["end"]])]
    if any(of["equal_flops"] for of in differences.values()):
        rows = [
            [name, with_verdict(point), f"{point['tokens']:,}", _cost(point), *_power(point)]
            for name, of in _named(differences)
            if (point := of["equal_flops"])
        ]
        tables.append(table(["with equal FLOPs", "difference", "tokens", "tokens of the reference", *_POWER], rows))
    if any(of["start"] for of in differences.values()):
        rows = [[name, with_verdict(of["start"])] for name, of in _named(differences) if of["start"]]
        tables.append(table(["at step 0", "difference"], rows))
    if not tables:
        return ""
    about = (
        "Differences are in bits per byte, between arms with the same seeds on the same documents. ± is half of a"
        " 95 % interval. The intervals of all differences in a table that get a verdict hold at once (Bonferroni)."
        " An interval combines two standard errors: one over documents (jackknife) and one over seeds. A difference"
        f" with fewer than {LEAST_SEEDS} seeds uses the spread over seeds that is pooled over the grid's arms, after"
        " removing the effect that a seed has on all of them. Arms from random weights are pooled separately. A"
        " difference whose own spread is significantly wider, or much narrower, uses its own (F tests), and so do"
        " differences with equal FLOPs. With one seed there is no verdict. A difference is a tie if its whole"
        f" interval lies within {margin:g} of 0 and the grid detects a difference of this size with 80 % probability."
        " It is not resolved if its interval contains 0 otherwise. If a learning rate falls, the middle of a training"
        " is compared only with trainings of the same steps and schedule. FLOPs are made equal by interpolating the"
        ' reference\'s curve linearly in the logarithm of the tokens. "Better from" is the number of tokens after'
        " which every point is better. The search goes back from the end and stops at the first point that is not"
        " better, so it needs no correction for the number of points. The intervals along a curve do not hold all at"
        " once."
    )
    return section("Differences", *tables, about)


def _named(differences: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{arm} minus {of['reference']}", of) for arm, of in differences.items()]


def _tokens(tokens: int | None) -> str:
    return "-" if tokens is None else f"{tokens:,} tokens"


def _power(point: Mapping[str, Any]) -> list[str]:
    """Return the cells of the columns `_POWER`."""
    seeds = f"{number(point['stderr_seeds'], 2)}{' (pooled)' if point['is_pooled'] else ''}"
    seen = "-" if point["verdict"] == ONE_SEED else number(point["resolvable"], 2)
    return [number(point["stderr_documents"], 2), seeds, seen]


def _seeds(point: Mapping[str, Any]) -> str:
    if point["verdict"] != "not resolved":
        return "-"
    return "needs more documents" if point["seeds_needed"] is None else str(point["seeds_needed"])


def _seen(points: Sequence[Mapping[str, Any]]) -> str:
    """Say how small a difference these trainings can detect."""
    seen = sorted(point["resolvable"] for point in points if point["resolvable"] and point["verdict"] != ONE_SEED)
    if not seen:
        return ""
    return (
        f"With a probability of 80 %, these trainings would have shown a difference of {number(seen[0], 2)} in the"
        f" best row, {number(seen[len(seen) // 2], 2)} in the median row and {number(seen[-1], 2)} in the worst row."
    )


def _cost(point: Mapping[str, Any]) -> str:
    times = "" if abs(point["flops_ratio"] - 1) < 5e-4 else f", {point['flops_ratio']:.3f} times the FLOPs"
    return f"{point['reference_tokens']:,.0f}{times}"


def _sources(arms: Mapping[str, Any]) -> str:
    names = list(next(iter(arms.values()))["sources"])
    if len(names) < 2:
        return ""
    rows = [[arm, *(mean_with_interval(result["sources"][name]) for name in names)] for arm, result in arms.items()]
    return section("By source", table(["bits per byte at the end", *names], rows))
