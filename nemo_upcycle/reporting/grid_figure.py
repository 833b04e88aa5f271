"""The figure of a grid: bits per byte over tokens, and differences from the references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_upcycle.reporting.figures import legend_below, short_numbers, tokens_axis


if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow; behind them, of Paul Tol's and
#: others, what is least like them. Of 20 arms no two have the same colour, of 80 none the same colour and line.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#332288", "#117733", "#CC6677", "#44AA99", "#888888"),
    *("#661100", "#AA4499", "#DDCC77", "#6699CC", "#AACC00", "#4B2E1E"),
)
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX<>*"
#: How a verdict is drawn: colour, marker, and whether it is filled.
_VERDICTS = {
    "better": ("#009E73", "v", True),
    "worse": ("#D55E00", "^", True),
    "tie": ("#000000", "D", True),
    "not resolved": ("#555555", "o", False),
}


def arm_style(position: int) -> dict[str, Any]:
    """Return how the line of an arm is drawn, by its position among the arms."""
    return {
        "color": _COLOURS[position % len(_COLOURS)],
        "linestyle": _LINES[position // len(_COLOURS) % len(_LINES)],
        "marker": _MARKERS[position % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.4,
    }


def _labels(values: Mapping[str, Any]) -> dict[str, str]:
    """Name the arms for a legend; an arm with fewer seeds than the others is marked with their number."""
    seeds = {arm: len(result["seeds"]) for arm, result in values["arms"].items()}
    most = max(seeds.values())
    return {arm: arm if count == most else f"{arm} ({count} of {most} seeds)" for arm, count in seeds.items()}


def curves_figure(values: Mapping[str, Any]) -> Figure:
    """Draw three panels: every arm's curve, the curves enlarged with bands over seeds, and the differences.

    Args:
        values: result of `compare_arms`, or content of `table.json`.
    """
    from matplotlib.figure import Figure

    compared = {name: difference for name, difference in values["differences"].items() if difference["end"]}
    heights = [5.3, 1.1 + 0.3 * len(compared)][: 1 + bool(compared)]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    whole, near = parts[0].subplots(1, 2)
    starts = [result["start"]["value"] for result in values["arms"].values()]
    ends = [result["bits_per_byte"]["value"] for result in values["arms"].values()]
    ends = [
        end for end in ends if end <= max(starts)
    ] or ends  # an arm that went astray would press the others together
    top = max(*ends, min(starts))
    room = 0.15 * (top - min(ends)) or 0.01
    near.set_ylim(min(ends) - room, top + room)
    height, labels = near.get_ylim()[1] - near.get_ylim()[0], _labels(values)
    for position, (arm, result) in enumerate(values["arms"].items()):
        style = arm_style(position)
        tokens = [point["tokens"] for point in result["curve"]]
        for axes in (whole, near):
            axes.plot(tokens, [point["value"] for point in result["curve"]], label=labels[arm], **style)
        known = [point for point in result["curve"] if point["low"] is not None]
        if any(point["high"] - point["low"] > height / 2 for point in known):
            continue  # it would cover the lines, and the table has it
        band = [[point[key] for point in known] for key in ("tokens", "low", "high")]
        near.fill_between(*band, color=style["color"], alpha=0.1, linewidth=0)
    for axes, title in ((whole, "mean over seeds"), (near, "enlarged, with 95 % intervals over seeds that fit")):
        tokens_axis(axes, max(result["tokens"] for result in values["arms"].values()))
        axes.set_title(title, fontsize=10)
    whole.set_ylabel("bits per byte of held-out text")
    legend_below(parts[0], whole, 4)
    if compared:
        _draw_differences(parts[1].subplots(), compared, values["margin"])
    return figure


def _draw_differences(axes: Any, compared: Mapping[str, Any], margin: float) -> None:
    """Draw each arm's difference from its reference in the row that is labelled with both."""
    for position, difference in enumerate(compared.values()):
        end = difference["end"]
        colour, marker, is_filled = _VERDICTS[end["verdict"]]
        axes.errorbar(
            end["difference"],
            position,
            xerr=(end["high"] - end["low"]) / 2,
            fmt=marker,
            color=colour,
            markerfacecolor=colour if is_filled else "white",
            capsize=3,
        )
    axes.axvline(0, color="#999999", linewidth=1)
    axes.axvspan(-margin, margin, color="#999999", alpha=0.2, linewidth=0)
    axes.set_yticks(
        range(len(compared)),
        [
            f"{name} - {difference['reference']}, {short_numbers(difference['end']['tokens'])} tokens"
            for name, difference in compared.items()
        ],
    )
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.set_xlabel("difference in bits per byte (left: better)")
    axes.set_title(f"95 % intervals over documents and seeds; grey: the margin of ±{margin:g}", fontsize=10)
    axes.tick_params(axis="y", labelsize=8)
    for verdict, (colour, marker, is_filled) in _VERDICTS.items():
        fill = colour if is_filled else "white"
        axes.plot([], [], marker, color=colour, markerfacecolor=fill, label=verdict)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
