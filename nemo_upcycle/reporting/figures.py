"""The figures of a report, in colours that colour-blind readers can distinguish (Okabe-Ito, viridis)."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_upcycle.reporting.results import busiest, is_trial
from nemo_upcycle.reporting.router_metrics import ROUTER_METRICS
from nemo_upcycle.reporting.run_folder import Curve


if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = {"pretrain": ("MoE", "#0072B2", "o"), "dense_ct": ("baseline", "#D55E00", "s")}
#: Largest number of points in a curve, and of columns in a heat map. A page is too narrow for more.
_COLUMNS = 200
#: Width of a figure (inches), and font size of small print (points): 10 pixels if the page is 420 pixels wide.
_WIDE_IN, SMALL = 5.0, 9
DPI = 200


def loss_figure(curves: Mapping[str, Curve], flops_per_token: Mapping[str, float] | None = None) -> Figure:
    """Draw validation and training losses of the MoE and the baseline over tokens or FLOPs.

    A horizontal line marks the validation loss before the first step. If there is a baseline, this loss is the dense
    parent's loss.

    Args:
        curves: stage -> curve, for `pretrain` and optionally `dense_ct`.
        flops_per_token: stage -> training FLOPs per token; None draws the losses over tokens.
    """
    from matplotlib.figure import Figure

    factors = flops_per_token or dict.fromkeys(curves, 1.0)
    figure = Figure(figsize=(_WIDE_IN, 3.9), layout="constrained")
    axes = figure.subplots()
    _draw_losses(axes, curves, factors)
    label = "training FLOPs (full attention)" if flops_per_token else "training tokens"
    tokens_axis(axes, max(_last_tokens(curve) * factors[stage] for stage, curve in curves.items()), label)
    steps = max(curve.steps[-1]["step"] for curve in curves.values())
    models = " and ".join(STYLES[stage][0] for stage in curves)
    note = "\n(too few to measure a benefit)" if is_trial(steps) else ""
    axes.set_title(f"Loss of {models}, {steps:,} steps{note}", fontsize=10)
    axes.set(ylabel="loss (nats per token)")
    legend_below(figure, axes)
    return figure


def _last_tokens(curve: Curve) -> int:
    """Return the tokens at the last step of any branch."""
    return max(int(part.steps[-1]["tokens"]) for part in (curve, *curve.earlier.values()))


def _draw_losses(axes: Any, curves: Mapping[str, Curve], factors: Mapping[str, float]) -> None:
    """Draw all losses over tokens times each stage's factor; draw the earlier branches of a rewound training grey."""
    styles = itertools.cycle([":", "-.", "--"])
    for stage, curve in curves.items():
        name, colour, marker = STYLES[stage]
        if curve.validation:
            axes.plot(
                [tokens * factors[stage] for tokens, _ in curve.validation],
                [loss for _, loss in curve.validation],
                color=colour,
                marker=marker,
                markevery=max(1, len(curve.validation) // 25),
                linewidth=2,
                zorder=3,
                label=f"{name}, validation",
            )
        columns = averaged([(line["tokens"] * factors[stage], line["loss"]) for line in curve.steps])
        label = f"{name}, training{averaging_note(columns, curve.steps)}"
        axes.plot(*columns.T, color=colour, alpha=0.35, linewidth=1, zorder=1, label=label)
        for branch, earlier in curve.earlier.items():
            points = averaged([(line["tokens"] * factors[stage], line["loss"]) for line in earlier.steps])
            label = f"{name}, training, branch {branch}"
            axes.plot(*points.T, color="0.45", linestyle=next(styles), linewidth=1, zorder=1, label=label)
    validated = {stage: curve.validation[0] for stage, curve in curves.items() if curve.validation}
    begins = {stage: loss for stage, (tokens, loss) in validated.items() if not tokens}
    if begins:
        stage = "dense_ct" if "dense_ct" in begins else "pretrain"
        label = "parent, validation" if stage == "dense_ct" else "MoE at step 0, validation"
        axes.axhline(begins[stage], color="black", linestyle="--", linewidth=1, zorder=2, label=label)


def short_numbers(value: float) -> str:
    """Format a large number with three digits and a unit.

    Example:
        >>> short_numbers(1_500_000_000), short_numbers(3_047_424)
        ('1.5B', '3.05M')
    """
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="").format_eng(float(f"{value:.3g}")).replace("G", "B")


def tokens_axis(axes: Any, last: float, label: str = "training tokens") -> None:
    """Scale the x axis from 0 to the last token (or other cost), with few ticks and room for markers at both ends."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.set_xlim(-0.012 * last, 1.012 * last)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: short_numbers(value) if abs(value) >= 1000 else f"{value:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Any, axes: Any) -> None:
    """Put the legend of some axes below the figure, so that it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    sizes = {"fontsize": SMALL, "handlelength": 1.5, "columnspacing": 1.0}
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, **sizes)


def averaged(values: Sequence[Any]) -> Any:
    """Average values, one row per step, to at most 200 rows."""
    import numpy as np

    parts = np.array_split(np.array(values), min(_COLUMNS, len(values)))
    return np.array([part.mean(axis=0) for part in parts])


def averaging_note(columns: Any, steps: Sequence[Any]) -> str:
    """Return the end of a label that says how many steps were averaged; nothing if no steps were averaged."""
    return f", {math.ceil(len(steps) / len(columns))}-step means" if len(columns) < len(steps) else ""


def load_figure(curve: Curve) -> Figure | None:
    """Draw the busiest expert's load relative to a balanced load, by layer and step.

    If there are many steps, their loads are averaged.

    Args:
        curve: curve of a training stage.

    Returns:
        The figure; None if the stage has no experts.
    """
    import numpy as np
    from matplotlib.figure import Figure

    steps = [line for line in curve.steps if line.get("expert_load")]
    if not steps:
        return None
    columns = averaged([busiest(line["expert_load"]) for line in steps])
    busiest_of_layers = np.ma.masked_equal(columns.T, 0)  # 0: a layer without experts
    figure = Figure(figsize=(_WIDE_IN, 3.5), layout="constrained")
    axes: Any = figure.subplots()
    extent = (steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5, len(busiest_of_layers) - 0.5, -0.5)
    image = axes.imshow(busiest_of_layers, vmin=1, cmap="viridis", aspect="auto", interpolation="none", extent=extent)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    first, last = [float(busiest_of_layers[:, column].max()) for column in (0, -1)]
    worst = f"worst layer: {first:.2f} at first, {last:.2f} at last"
    figure.suptitle(f"Load of the busiest expert in each layer{averaging_note(columns, steps)}\n{worst}", fontsize=10)
    axes.set(xlabel="step", ylabel="layer")
    figure.colorbar(image, ax=axes, label="load (1: balanced)")
    return figure


def routers_figure(curve: Curve) -> Figure | None:
    """Draw the router metrics over tokens: the mean over the layers, and the range from lowest to highest layer.

    Args:
        curve: curve of a training stage.

    Returns:
        The figure; None if the stage has no routers.
    """
    import numpy as np
    from matplotlib.figure import Figure

    known = [(line["tokens"], line["router"]) for line in curve.steps if line.get("router")]
    drawn = {name: metric.title for name, metric in ROUTER_METRICS.items() if metric.is_drawn}
    panels = {name: title for name, title in drawn.items() if any(name in router for _, router in known)}
    if not panels:
        return None
    figure = Figure(figsize=(_WIDE_IN, 0.5 + 1.9 * len(panels)), layout="constrained")
    for number, (name, title) in enumerate(panels.items()):
        points = [
            (tokens, [one for one in router[name] if one is not None]) for tokens, router in known if name in router
        ]
        columns = averaged(
            [(tokens, np.mean(layers), min(layers), max(layers)) for tokens, layers in points if layers]
        )
        axes = figure.add_subplot(len(panels), 1, number + 1)
        axes.plot(columns[:, 0], columns[:, 1], color=STYLES["pretrain"][1], marker="o" if len(columns) < 20 else None)
        axes.fill_between(columns[:, 0], columns[:, 2], columns[:, 3], alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=10)
        tokens_axis(axes, curve.steps[-1]["tokens"])
    figure.suptitle("Routers: mean and range over the layers", fontsize=10)
    return figure


def heldout_figure(curves: Mapping[str, Curve]) -> Figure | None:
    """Draw bits per byte of held-out text over tokens, with 95 % intervals over documents.

    Args:
        curves: stage -> curve, for `pretrain` and optionally `dense_ct`.

    Returns:
        The figure; None if no stage has a score.
    """
    from matplotlib.figure import Figure

    scored = {stage: curve.scores for stage, curve in curves.items() if curve.scores}
    if not scored:
        return None
    figure = Figure(figsize=(_WIDE_IN, 3.5), layout="constrained")
    axes = figure.subplots()
    for stage, scores in scored.items():
        name, colour, marker = STYLES[stage]
        tokens, values, halves = zip(*scores, strict=True)
        axes.plot(tokens, values, color=colour, marker=marker, markersize=4, label=name)
        low, high = (
            [value + side * (half or 0.0) for value, half in zip(values, halves, strict=True)] for side in (-1, 1)
        )
        axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    tokens_axis(axes, max(curves[stage].steps[-1]["tokens"] for stage in scored))
    axes.set_ylabel("held-out bits per byte")
    axes.set_title("95 % intervals over documents", fontsize=10)
    legend_below(figure, axes)
    return figure


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    return drawn.getvalue()
