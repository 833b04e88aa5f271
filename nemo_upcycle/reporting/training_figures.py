"""Figures of the training itself: the routers over time, speed and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nemo_upcycle.reporting.figures import STYLES, averaged, legend_below, short_numbers, tidy, tokens_axis
from nemo_upcycle.reporting.run_folder import Curve


if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is drawn of the routers: the name in `metrics.jsonl` and the title.
ROUTER_PANELS = {
    "load_cv": "load of the experts: standard deviation over mean",
    "load_entropy": "entropy of the load over that of perfect balance",
    "dropped": "token slots dropped",
    "expert_distance": "distance of the experts from their mean, relative",
}


def routers_figure(curve: Curve) -> Figure | None:
    """Return the routers' health over tokens: the mean of the layers, and from the lowest to the highest of them.

    Args:
        curve: of a training stage.

    Returns:
        None when the stage has no routers.
    """
    import numpy as np
    from matplotlib.figure import Figure

    known = [(line["tokens"], line["router"]) for line in curve.steps if line.get("router")]
    names = [name for name in ROUTER_PANELS if any(name in router for _, router in known)]
    if not names:
        return None
    figure = Figure(figsize=(11, 3.6 * -(-len(names) // 2)), layout="constrained")
    for number, name in enumerate(names):
        points = [
            (tokens, [one for one in router[name] if one is not None]) for tokens, router in known if name in router
        ]
        columns = averaged(
            [(tokens, np.mean(layers), min(layers), max(layers)) for tokens, layers in points if layers]
        )
        axes = figure.add_subplot(-(-len(names) // 2), 2, number + 1)
        axes.plot(columns[:, 0], columns[:, 1], color=STYLES["pretrain"][1], marker="o" if len(columns) < 20 else None)
        axes.fill_between(columns[:, 0], columns[:, 2], columns[:, 3], alpha=0.15, linewidth=0)
        axes.set_title(ROUTER_PANELS[name], fontsize=10)
        tokens_axis(axes, curve.steps[-1]["tokens"])
    figure.suptitle("Routers: mean of the layers, and the range over them", fontsize=11)
    return figure


def speed_figure(curves: Mapping[str, Curve]) -> Figure:
    """Return tokens per second at every step, and the most memory that any rank has held.

    Args:
        curves: by stage, `pretrain` and perhaps `dense_ct`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for stage, curve in curves.items():
        name, colour, marker = STYLES[stage]
        for axes, key in ((left, "tokens_per_s"), (right, "memory_gib")):
            if points := [(line["step"], line[key]) for line in curve.steps if line.get(key) is not None]:
                columns = averaged(points)
                axes.plot(*columns.T, color=colour, marker=marker if len(columns) < 20 else None, label=name)
    left.set(xlabel="step", ylabel="tokens per second, all ranks")
    right.set(xlabel="step", ylabel="peak memory of a rank, GiB")
    for axes in (left, right):
        tidy(axes)
        axes.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(lambda value, _: short_numbers(value))
    legend_below(figure, left, ncols=2)
    return figure
