"""The figure of a grid: differences from the reference arms, and bits per byte over tokens."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_upcycle.reporting.figures import short_numbers, tokens_axis


if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours without yellow; colour-blind readers can distinguish them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
#: Largest number of series in the figure, because nobody can distinguish more. The table has the other series.
MOST_SERIES = len(_COLOURS)
_MARKERS = "osD^vPX<"
#: verdict -> colour, marker, and whether the marker is filled
_VERDICTS = {
    "better": ("#009E73", "v", True),
    "worse": ("#D55E00", "^", True),
    "tie": ("#000000", "D", True),
    "not resolved": ("#555555", "o", False),
    "one seed": ("#AAAAAA", "x", False),
}


def drawn_arms(values: Mapping[str, Any]) -> list[str]:
    """Choose the arms whose curves are drawn: the best at the end among the arms with the most seeds.

    An arm with fewer seeds is excluded, because its mean depends more on luck. An arm that ends above the median start
    is excluded, because its curve presses the other curves together. The table contains both kinds of arms.

    Args:
        values: result of `compare_arms`, or content of `table.json`.
    """
    arms = values["arms"]
    most = max(len(arm["seeds"]) for arm in arms.values())
    top = statistics.median(arm["start"]["value"] for arm in arms.values())
    ends = {name: arm["bits_per_byte"]["value"] for name, arm in arms.items() if len(arm["seeds"]) == most}
    below = {name: end for name, end in ends.items() if end <= top} or ends
    chosen = sorted(below, key=lambda name: below[name])[:MOST_SERIES]
    return [name for name in arms if name in chosen]


def in_words(arm: str) -> str:
    """Return an arm's name with blanks instead of underscores."""
    return arm.replace("_", " ")


def grid_figure(values: Mapping[str, Any]) -> Figure:
    """Draw the differences from the reference arms, and the curves below them.

    Args:
        values: result of `compare_arms`, or content of `table.json`.
    """
    from matplotlib.figure import Figure

    compared = {name: difference for name, difference in values["differences"].items() if difference["end"]}
    heights = [1.3 + 0.3 * len(compared), 4.4] if compared else [4.4]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if compared:
        _draw_differences(parts[0].subplots(), compared, values)
    _draw_curves(parts[-1].subplots(), values)
    return figure


def _draw_curves(axes: Any, values: Mapping[str, Any]) -> None:
    """Draw the curves; cut the y axis above the median start of the arms."""
    arms, drawn = values["arms"], drawn_arms(values)
    lowest = min(point["value"] for arm in drawn for point in arms[arm]["curve"])
    top = statistics.median(arms[arm]["start"]["value"] for arm in drawn)
    room = 0.08 * (top - lowest) or 0.01
    for position, arm in enumerate(drawn):
        curve = arms[arm]["curve"]
        tokens = [point["tokens"] for point in curve]
        style = {"color": _COLOURS[position], "marker": _MARKERS[position], "markersize": 4.5, "linewidth": 1.4}
        axes.plot(tokens, [point["value"] for point in curve], label=in_words(arm), **style)
    axes.set_ylim(lowest - room, top + room)
    tokens_axis(axes, max(arms[arm]["tokens"] for arm in drawn))
    axes.set_ylabel("held-out bits per byte")
    seeds, others = len(arms[drawn[0]]["seeds"]), len(arms) - len(drawn)
    title = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    title += f"; {others} more in the table" if others else ""
    highest = max(point["value"] for arm in drawn for point in arms[arm]["curve"])
    title += "; cut above the start of most arms" if highest > top + room else ""
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _draw_differences(axes: Any, compared: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Draw each arm's difference from its reference, one row per arm."""
    verdicts = [difference["end"]["verdict"] for difference in compared.values()]
    for position, difference in enumerate(compared.values()):
        end = difference["end"]
        colour, marker, is_filled = _VERDICTS[end["verdict"]]
        axes.errorbar(
            end["difference"],
            position,
            xerr=None if end["low"] is None else (end["high"] - end["low"]) / 2,
            fmt=marker,
            color=colour,
            markerfacecolor=colour if is_filled else "white",
            capsize=3,
        )
    axes.axvline(0, color="#999999", linewidth=1)
    axes.axvspan(-values["margin"], values["margin"], color="#999999", alpha=0.2, linewidth=0)
    axes.set_yticks(
        range(len(compared)),
        [
            f"{in_words(name)} minus {in_words(of['reference'])}, {short_numbers(of['end']['tokens'])} tokens"
            for name, of in compared.items()
        ],
    )
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.set_xlabel("difference in bits per byte (left is better)")
    axes.set_title(_title(compared, values), fontsize=10)
    axes.tick_params(axis="y", labelsize=8)
    for verdict, (colour, marker, is_filled) in _VERDICTS.items():
        if verdict in verdicts:
            fill = colour if is_filled else "white"
            axes.plot([], [], marker, color=colour, markerfacecolor=fill, label=verdict)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _title(compared: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Return the title, which says on how many documents and seeds the intervals are based."""
    ends = [difference["end"] for difference in compared.values()]
    if all(end["low"] is None for end in ends):
        return "one seed: no intervals"
    counts = sorted({len(end["seeds"]) for end in ends})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return (
        f"95 % intervals over {ends[0]['documents']} documents and {seeds} seeds,\n"
        f"{values['tests']['end']} intervals hold at once; grey: margin of ±{values['margin']:g}"
    )
