"""What a grid of parents with several budgets shows: by how much upcycling beats going on, and beginning anew."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_upcycle.evaluation.arms import difference_of_arms, mean_of_seeds, sums_after, tokens_to_reach
from nemo_upcycle.evaluation.compare import jackknife_stderr, left_out
from nemo_upcycle.evaluation.heldout import METRIC, Sums, bits_per_byte
from nemo_upcycle.planning.law import shape_name
from nemo_upcycle.reporting.figures import legend_below, short_numbers, tidy
from nemo_upcycle.reporting.grid import COSTS_APART, ArmRecord
from nemo_upcycle.reporting.grid_figures import arm_style
from nemo_upcycle.reporting.markdown import mean_with_interval, section, table, with_verdict


if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A row of `points.csv` for each training that is the point of a curve.
COLUMNS = (
    *("option", "parent_tokens", "tokens", "experts", "topk", "granularity", "active_parameters", "total_parameters"),
    *("training_flops", "seconds", "seed", "loss", "loss_stderr", "bits_per_byte", "start_loss", "steps", "arm"),
    "schedule",
)
#: What tells MoEs of a grid apart, and the name of its dense models.
_MODEL = ("experts", "topk", "granularity")
_DENSE = shape_name(1, 1, 1)


def option_of(cell: Mapping[str, Any]) -> str:
    """Return what a training of a curve is: `dense` or `moe`, `dense_from_nothing` or `moe_from_nothing`."""
    kind = "dense" if cell["experts"] == 1 else "moe"
    return kind if cell["parent_tokens"] else f"{kind}_from_nothing"


def points_csv(evidence: Mapping[str, Any], arms: Mapping[str, ArmRecord]) -> str:
    """Return a line for each training that is the point of a curve; losses are nats a token of the grid's tokenizer.

    Args:
        evidence: what `collect_evidence` or `read_evidence` returned.
        arms: from `arms_of`.

    Returns:
        The CSV file; "" where the grid has no curves of ends.
    """
    if not _curves(evidence["described"]):
        return ""
    nats = math.log(2) * evidence["heldout"]["bytes"] / evidence["heldout"]["tokens"]
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    rows.writeheader()
    for cell in _curves(evidence["described"]):
        arm, tokens = arms[cell["arm"]], cell["steps"] * cell["tokens_per_step"]
        sums = arm.scores.get(tokens, {}).get(cell["seed"])
        if sums is None:  # what was no number
            continue
        stderr = jackknife_stderr(left_out(METRIC, list(sums.values())))
        known = {
            "option": option_of(cell),
            "tokens": tokens,
            "training_flops": tokens * arm.flops_per_token,
            "seconds": tokens * arm.rank_seconds_per_token,
            "loss": bits_per_byte(sums) * nats,
            "loss_stderr": None if stderr is None else stderr * nats,
            "bits_per_byte": bits_per_byte(sums),
            "start_loss": bits_per_byte(arm.scores[0][cell["seed"]]) * nats if cell["seed"] in arm.scores[0] else None,
        }
        rows.writerow(dict(cell) | known)
    return text.getvalue()


def compare_parents(arms: Mapping[str, ArmRecord], described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare every upcycled point with its parent trained on, and with the same MoE from nothing.

    Args:
        arms: from `arms_of`.
        described: of the grid's plan.

    Returns:
        For each `arm` that upcycles, and each of its `tokens`: `parent_tokens`, the means `dense` and `moe`; the
        differences of the MoE from the parent trained on, with `equal_tokens`, `equal_flops` and `equal_time`, and
        from the MoE `from_nothing` that has as many tokens as parent and MoE together, None where a curve ends before;
        and `overtaken`, the tokens with which the MoE from nothing reaches as much, None where no curve tells.
    """
    curves = {cell["arm"]: cell for cell in _curves(described)}

    def arm_like(cell: Mapping[str, Any], option: str, *keys: str) -> ArmRecord | None:
        same = ((name, other) for name, other in curves.items() if all(other[key] == cell[key] for key in keys))
        return next((arms[name] for name, other in same if option_of(other) == option), None)

    rows = []
    for name, cell in sorted(curves.items(), key=lambda item: item[1]["parent_tokens"]):
        moe, parent_tokens, dense = arms[name], cell["parent_tokens"], arm_like(cell, "dense", "parent")
        if option_of(cell) != "moe" or dense is None:
            continue
        anew = arm_like(cell, "moe_from_nothing", *_MODEL)
        points = anew.scores.items() if anew else ()
        reached = {tokens: mean_of_seeds(scores)["value"] for tokens, scores in points if tokens}
        for tokens in filter(None, moe.scores):
            seeds, margin = moe.scores[tokens], described["margin"]
            paid = tokens * moe.flops_per_token / dense.flops_per_token
            took = tokens * moe.rank_seconds_per_token / dense.rank_seconds_per_token
            rows.append(
                {
                    "arm": name,
                    "parent_tokens": parent_tokens,
                    "tokens": tokens,
                    "dense": mean_of_seeds(dense.scores[tokens]) if dense.scores.get(tokens) else None,
                    "moe": mean_of_seeds(seeds),
                    "equal_tokens": _against(seeds, dense, tokens, margin),
                    "equal_flops": _against(seeds, dense, paid, margin),
                    "equal_time": _against(seeds, dense, took, margin),
                    "from_nothing": anew and _against(seeds, anew, parent_tokens + tokens, margin),
                    "overtaken": tokens_to_reach(mean_of_seeds(seeds)["value"], reached),
                }
            )
    return rows


def _curves(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in described["cells"].values() if cell.get("is_length")]


def _against(seeds: Mapping[int, Sums], other: ArmRecord, tokens: float, margin: float) -> dict[str, Any] | None:
    """Return the difference from another arm after some tokens; None where its curve does not reach so far."""
    points = [point for point in other.scores if point]
    nearest = min(points, key=lambda point: abs(point / tokens - 1))
    tokens = nearest if abs(nearest / tokens - 1) < COSTS_APART else tokens
    if not min(points) <= tokens <= max(points):
        return None
    reference = sums_after(tokens, other.scores)
    return difference_of_arms(seeds, reference, margin) if set(seeds) & set(reference) else None


def parents_section(rows: list[dict[str, Any]]) -> str:
    """Return the table of what `compare_parents` returned."""
    if not rows:
        return ""
    header = ["parent's tokens", "new tokens", "arm", "dense", "MoE", "equal tokens", "equal FLOPs", "equal minutes"]
    cells = [
        [
            short_numbers(row["parent_tokens"]),
            short_numbers(row["tokens"]),
            row["arm"],
            mean_with_interval(row["dense"]) if row["dense"] else "-",
            mean_with_interval(row["moe"]),
            *(with_verdict(row[key]) for key in ("equal_tokens", "equal_flops", "equal_time", "from_nothing")),
            "-" if row["overtaken"] is None else _overtaken(row),
        ]
        for row in rows
    ]
    return section(
        "By the parent's budget",
        table([*header, "to the MoE from nothing, all tokens", "it needs"], cells),
        "Bits per byte of the parent trained on and of the MoE; differences are MoE minus dense, below 0 the MoE is"
        " better, as in the table above. FLOPs and minutes are those after the parent: its own are spent. To the MoE"
        " from nothing the difference is after the tokens of parent and MoE together; `it needs` are the tokens with"
        " which it reaches as much, and how many times the new ones that is. Between the ends of two trainings bits"
        " per byte are taken to be linear in the logarithm of the tokens; beyond a curve nothing is said (-). Of a"
        " token's time the fastest twentieth of all steps of the same model counts.",
        "![parents](parents.png)",
    )


def _overtaken(row: Mapping[str, Any]) -> str:
    return f"{short_numbers(row['overtaken'])} ({row['overtaken'] / row['tokens']:.1f} times)"


def _shape(cell: Mapping[str, Any]) -> str:
    return shape_name(*(cell[name] for name in _MODEL))


def _series(rows: list[dict[str, Any]], shapes: Mapping[str, str]) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """Return the rows of each line of gains, one row a parent: by shape, number among MoEs of it, and new tokens.

    Args:
        rows: what `compare_parents` returned.
        shapes: of the MoEs, by arm.
    """
    series: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["equal_tokens"]:
            number, shape, tokens = 0, shapes[row["arm"]], row["tokens"]
            while row["parent_tokens"] in (one["parent_tokens"] for one in series.get((shape, number, tokens), ())):
                number += 1
            series.setdefault((shape, number, tokens), []).append(row)
    return {key: series[key] for key in sorted(series)}


def parents_figure(
    rows: list[dict[str, Any]], arms: Mapping[str, ArmRecord], described: Mapping[str, Any]
) -> Figure | None:
    """Return two panels: curves over all tokens, from nothing and after each parent, and the gains by the parent.

    Args:
        rows: what `compare_parents` returned; no figure without any.
        arms: from `arms_of`.
        described: of the grid's plan.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    if not rows:
        return None
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    curves_axes, gains_axes = figure.subplots(1, 2)
    curves = {cell["arm"]: cell for cell in _curves(described)}
    parents = sorted({cell["parent_tokens"] for cell in curves.values()})
    shapes = sorted({_shape(cell) for cell in curves.values()} - {_DENSE})
    names = {"dense": "trained on", "moe": "upcycled", "dense_from_nothing": "dense", "moe_from_nothing": "MoE"}
    for name, cell in curves.items():
        before, option, shape = cell["parent_tokens"], option_of(cell), _shape(cell)
        style, what = arm_style(parents.index(before)) | {"linestyle": ":", "marker": "s"}, names[option]
        if shape != _DENSE:
            style |= {"linestyle": "-", "marker": arm_style(2 * shapes.index(shape))["marker"]}
            what += f" {shape}" if len(shapes) > 1 else ""
        points = {before + tokens: scores for tokens, scores in arms[name].scores.items() if tokens or before}
        label = f"{short_numbers(before)}, {what}" if before else f"{what} from nothing"
        means = [mean_of_seeds(scores)["value"] for scores in points.values()]
        curves_axes.plot(list(points), means, label=label, **style)
    series = _series(rows, {name: _shape(cell) for name, cell in curves.items()})
    for position, ((shape, number, tokens), known) in enumerate(series.items()):
        gains = [-row["equal_tokens"]["difference"] for row in known]
        half = [(row["equal_tokens"]["high"] - row["equal_tokens"]["low"]) / 2 for row in known]
        where = [row["parent_tokens"] * 1.03 ** (position - (len(series) - 1) / 2) for row in known]
        label = f"{short_numbers(tokens)} new tokens{f', {shape}' if len(shapes) > 1 else ''}"
        label += f" ({number + 1})" if number else ""
        gains_axes.errorbar(where, gains, yerr=half, capsize=3, label=label, **arm_style(position))
    gains_axes.axhline(0, color="#999999", linewidth=1)
    curves_axes.set_ylabel("bits per byte of held-out text")
    gains_axes.set_ylabel("gain of the MoE, equal new tokens, bits per byte")
    both = ((curves_axes, "tokens, the parent's included"), (gains_axes, "tokens of the parent"))
    for axes, title in both:
        axes.set_xlabel(title)
        axes.set_xscale("log")
        tidy(axes)
        ticks = [tokens for tokens in parents if tokens]
        axes.set_xticks(ticks, [short_numbers(float(f"{tokens:.2g}")) for tokens in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    gains_axes.legend(fontsize=8, frameon=False)
    legend_below(figure, curves_axes, 5, "means over seeds; 95 % intervals over documents and seeds")
    return figure
