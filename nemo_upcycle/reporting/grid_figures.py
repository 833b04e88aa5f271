"""The figures of a grid: bits per byte over tokens, differences from the references, routers, budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_upcycle.reporting.training_figures import ROUTER_PANELS


if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, told apart by colour-blind readers; markers tell arms of the same colour apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX*"


def curves_figure(values: Mapping[str, Any]) -> Figure:
    """Return two panels: every arm's curve with its band over seeds, and the differences with their error bars.

    Args:
        values: what `compare_arms` returned.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for position, (arm, found) in enumerate(values["arms"].items()):
        colour, marker = _style(position)
        tokens = list(found["curve"])
        means = [point["value"] for point in found["curve"].values()]
        spread = [point["stderr"] or 0.0 for point in found["curve"].values()]
        left.plot(tokens, means, color=colour, marker=marker, markersize=4, linewidth=1.5, label=arm)
        low = [mean - band for mean, band in zip(means, spread, strict=True)]
        high = [mean + band for mean, band in zip(means, spread, strict=True)]
        left.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    left.set_xlabel("tokens")
    left.set_ylabel("bits per byte of held-out text")
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    left.legend(fontsize=7, ncols=2)
    left.set_title("mean over seeds, ± one standard error", fontsize=10)
    names = list(values["differences"])
    for position, name in enumerate(names):
        found = values["differences"][name]
        right.errorbar(
            found["end"]["difference"],
            position,
            xerr=(found["end"]["high"] - found["end"]["low"]) / 2,
            fmt="o",
            color={"better": "#009E73", "worse": "#D55E00", "tie": "#555555"}[found["end"]["verdict"]],
            capsize=3,
        )
    right.axvline(0, color="#999999", linewidth=1)
    right.set_yticks(range(len(names)), [f"{name} - {values['differences'][name]['reference']}" for name in names])
    right.invert_yaxis()
    right.set_xlabel("difference in bits per byte (left: better)")
    right.set_title("at the last common step, 95 % intervals over documents and seeds", fontsize=10)
    right.tick_params(axis="y", labelsize=8)
    return figure


def _style(position: int) -> tuple[str, str]:
    return _COLOURS[position % len(_COLOURS)], _MARKERS[position // len(_COLOURS) % len(_MARKERS)]


def routers_figure(values: Mapping[str, Any]) -> Figure | None:
    """Return the routers' health of every arm over tokens; None where no arm has experts.

    Args:
        values: what `compare_arms` returned.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    if not any(found["routers"] for found in values["arms"].values()):
        return None
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (name, title) in zip(panels, ROUTER_PANELS.items(), strict=True):
        for position, (arm, found) in enumerate(values["arms"].items()):
            if not (points := found["routers"].get(name)):
                continue
            colour, marker = _style(position)
            every = max(1, len(points) // 10)
            axes.plot(
                list(points),
                list(points.values()),
                color=colour,
                marker=marker,
                markersize=4,
                markevery=every,
                linewidth=1.2,
                label=arm,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7, ncols=2)
    figure.suptitle("mean over layers and seeds", fontsize=10)
    return figure


def budgets_figure(values: Mapping[str, Any]) -> Figure | None:
    """Return what some arms reach with each budget, in tokens and in FLOPs; None where the grid names no budgets.

    Args:
        values: what `compare_arms` returned.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    if not values["budgets"]:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (unit, title) in zip(
        figure.subplots(1, 2, sharey=True), {"tokens": "tokens", "flops": "training FLOPs"}.items(), strict=True
    ):
        for position, (arm, entries) in enumerate(values["budgets"].items()):
            colour, marker = _style(position)
            axes.errorbar(
                [entry[unit] for entry in entries],
                [entry["value"] for entry in entries],
                yerr=[entry["stderr"] or 0.0 for entry in entries],
                color=colour,
                marker=marker,
                capsize=3,
                label=arm,
            )
        axes.set_xscale("log")
        axes.set_xlabel(title)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(EngFormatter(sep=""))
        axes.tick_params(axis="x", which="both", labelsize=7)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("bits per byte at the end, ± one standard error")
    return figure
