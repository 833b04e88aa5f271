"""The figures of a report, in colours that colour-blind readers tell apart (Okabe-Ito, purple to orange)."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from nemo_upcycle.reporting import markdown
from nemo_upcycle.reporting.results import PAIRS, busiest
from nemo_upcycle.reporting.router_metrics import ROUTER_METRICS
from nemo_upcycle.reporting.run_folder import MODELS, Curve


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {"pretrain": ("MoE", "#0072B2", "o"), "dense_ct": ("baseline", "#D55E00", "s")}
#: Most points of a curve and columns of a heat map: more cannot be distinguished in a page's width.
_COLUMNS = 200
#: A run with fewer steps only shows that the chain works; its figures and report carry a note.
FEW_STEPS = 100
_COLOURS = {
    "dense": "#000000",
    "step0": "#56B4E9",
    "trained": STYLES["pretrain"][1],
    "dense_ct": STYLES["dense_ct"][1],
}
_PAIR_COLOURS = ("#D55E00", "#0072B2", "#888888")
#: Characters of a metric's label, and of a line of it.
_LONGEST, _LINE = 50, 20
#: Inches that a figure is wide, and its size of small print in points: 10 pixels where the page has 420.
_WIDE_IN, SMALL = 5.0, 9
DPI = 200


def is_short(steps: int) -> bool:
    """Say whether a run has so few steps that it shows only that the chain works."""
    return steps < FEW_STEPS


def loss_figure(curves: Mapping[str, Curve], flops_per_token: Mapping[str, float] | None = None) -> Figure:
    """Draw the validation loss of the MoE and its baseline over tokens, or over FLOPs, with training loss behind it.

    A horizontal line marks the validation loss before the first step; the baseline's is the loss of the dense parent.

    Args:
        curves: stage -> curve, for `pretrain` and perhaps `dense_ct`.
        flops_per_token: stage -> FLOPs of a token in training; None: over tokens.
    """
    from matplotlib.figure import Figure

    factors = flops_per_token or dict.fromkeys(curves, 1.0)
    figure = Figure(figsize=(_WIDE_IN, 3.9), layout="constrained")
    axes = figure.subplots()
    _draw_losses(axes, curves, factors)
    label = "training FLOPs, counting full attention" if flops_per_token else "tokens trained on"
    tokens_axis(axes, max(curve.steps[-1]["tokens"] * factors[stage] for stage, curve in curves.items()), label)
    steps = max(curve.steps[-1]["step"] for curve in curves.values())
    models = " and ".join(STYLES[stage][0] for stage in curves)
    note = "\nso few show that the chain works, no more" if is_short(steps) else ""
    axes.set_title(f"Loss of {models}, {steps:,} steps{note}", fontsize=10)
    axes.set(ylabel="loss (nats per token)")
    legend_below(figure, axes, ncols=2)
    return figure


def _draw_losses(axes: Any, curves: Mapping[str, Curve], factors: Mapping[str, float]) -> None:
    """Draw all losses over tokens times a factor."""
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
    validated = {stage: curve.validation[0] for stage, curve in curves.items() if curve.validation}
    begins = {stage: loss for stage, (tokens, loss) in validated.items() if not tokens}
    if begins:
        stage = "dense_ct" if "dense_ct" in begins else "pretrain"
        label = "parent, validation" if stage == "dense_ct" else "MoE at step 0, validation"
        axes.axhline(begins[stage], color="black", linestyle="--", linewidth=1, zorder=2, label=label)


def short_numbers(value: float) -> str:
    """Return a large number in short.

    Example:
        >>> short_numbers(1_500_000_000), short_numbers(3_047_424)
        ('1.5B', '3.05M')
    """
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="").format_eng(float(f"{value:.3g}")).replace("G", "B")


def tokens_axis(axes: Any, last: float, label: str = "tokens trained on") -> None:
    """Let the x axis go from 0 to the last token, or another cost, with few ticks, and room for markers there."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.set_xlim(-0.012 * last, 1.012 * last)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    tidy(axes)


def legend_below(figure: Any, axes: Any, ncols: int, title: str | None = None) -> None:
    """Name the lines of some axes below a figure, or a part of one, where the names cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    sizes = {"fontsize": SMALL, "title_fontsize": SMALL, "handlelength": 1.5, "columnspacing": 1.0}
    figure.legend(handles, labels, loc="outside lower center", title=title, ncols=ncols, frameon=False, **sizes)


def tidy(axes: Any, axis: str = "both") -> None:
    """Give axes a grid, no frame, and large numbers in short: 1.5B."""
    axes.xaxis.set_major_formatter(lambda value, _: short_numbers(value) if abs(value) >= 1000 else f"{value:g}")
    axes.grid(alpha=0.3, axis=axis)
    axes.spines[["top", "right"]].set_visible(False)


def averaged(values: Sequence[Any]) -> Any:
    """Return an array with one row a step, averaged to at most 200 rows."""
    import numpy as np

    parts = np.array_split(np.array(values), min(_COLUMNS, len(values)))
    return np.array([part.mean(axis=0) for part in parts])


def averaging_note(columns: Any, steps: Sequence[Any]) -> str:
    """Return the end of a label of `averaged` columns; nothing where none was averaged."""
    return f", {math.ceil(len(steps) / len(columns))}-step means" if len(columns) < len(steps) else ""


def load_figure(curve: Curve) -> Figure | None:
    """Return the load of the busiest expert of each layer over the steps, and of all experts at first and last step.

    Args:
        curve: the curve of a training stage.

    Returns:
        None when the stage has no experts.
    """
    from matplotlib.figure import Figure

    steps = [line for line in curve.steps if line.get("expert_load")]
    if not steps:
        return None
    layers = len(steps[0]["expert_load"])
    figure = Figure(figsize=(_WIDE_IN, min(16, 5 + 0.2 * layers)), layout="constrained")
    over_time, at_steps = cast("Any", figure.subfigures(2, 1))
    _draw_busiest(over_time, steps)
    _draw_first_and_last(at_steps, steps)
    return figure


def _draw_busiest(figure: Any, steps: list[dict[str, Any]]) -> None:
    """Draw the busiest expert's load over the balanced one, by layer and step; many steps are averaged."""
    import numpy as np

    columns = averaged([busiest(line["expert_load"]) for line in steps])
    busiest_of_layers = np.ma.masked_equal(columns.T, 0)  # 0: a layer without experts
    axes = figure.subplots()
    extent = (steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5, len(busiest_of_layers) - 0.5, -0.5)
    image = axes.imshow(busiest_of_layers, vmin=1, cmap="viridis", aspect="auto", interpolation="none", extent=extent)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    first, last = [float(busiest_of_layers[:, column].max()) for column in (0, -1)]
    worst = f"worst layer at first {first:.2f}, at last {last:.2f}"
    figure.suptitle(f"Busiest expert of a layer{averaging_note(columns, steps)}\n{worst}", fontsize=10)
    axes.set(xlabel="step", ylabel="layer")
    figure.colorbar(image, ax=axes, label="load over balanced load")


def _draw_first_and_last(figure: Any, steps: list[dict[str, Any]]) -> None:
    """Draw each expert's share of the token slots of each layer, at the first and the last step."""
    from matplotlib.colors import TwoSlopeNorm

    balanced = 1 / len(steps[0]["expert_load"][0])
    highest = max(share for line in (steps[0], steps[-1]) for row in line["expert_load"] for share in row)
    highest = max(highest, 1.01 * balanced)
    norm = TwoSlopeNorm(balanced, vmin=0, vmax=highest)
    panels = figure.subplots(1, 2, sharey=True)
    images = [_draw_load(axes, line, norm) for axes, line in zip(panels, (steps[0], steps[-1]), strict=True)]
    panels[0].set_ylabel("layer")
    figure.suptitle("Each expert's share of its layer's token slots", fontsize=10)
    bar = figure.colorbar(images[-1], ax=panels)
    bar.ax.axhline(balanced, color="black", linewidth=1.5)
    ticks = [0, balanced / 2, balanced, (balanced + highest) / 2, highest]
    labels = [f"{100 * tick:.3g} %" + ("\n= 1/E" if tick == balanced else "") for tick in ticks]
    bar.set_ticks(ticks, labels=labels)


def _draw_load(axes: Axes, line: dict[str, Any], norm: Any) -> Any:
    """Draw one step; rows of zeros (layers without experts) stay blank."""
    load_LE = [row if any(row) else [float("nan")] * len(row) for row in line["expert_load"]]
    image = axes.imshow(load_LE, norm=norm, cmap="PuOr_r", aspect="auto", interpolation="none")
    layers, experts = len(load_LE), len(load_LE[0])
    axes.set(title=f"step {line['step']}", xlabel="expert")
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    axes.set_yticks(range(0, layers, max(1, layers // 16)))
    return image


def routers_figure(curve: Curve) -> Figure | None:
    """Return the routers' health over tokens: the mean of the layers, and from the lowest to the highest of them.

    Args:
        curve: the curve of a training stage.

    Returns:
        None when the stage has no routers.
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
    figure.suptitle("Routers: mean of the layers, and the range over them", fontsize=10)
    return figure


def speed_figure(curves: Mapping[str, Curve]) -> Figure:
    """Draw the tokens per second of every step, and the most memory that any rank has held.

    Args:
        curves: stage -> curve, for `pretrain` and perhaps `dense_ct`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDE_IN, 5), layout="constrained")
    speed, memory = figure.subplots(2, 1)
    for stage, curve in curves.items():
        name, colour, marker = STYLES[stage]
        for axes, key in ((speed, "tokens_per_s"), (memory, "memory_gib")):
            if points := [(line["step"], line[key]) for line in curve.steps if line.get(key) is not None]:
                columns = averaged(points)
                axes.plot(*columns.T, color=colour, marker=marker if len(columns) < 20 else None, label=name)
    speed.set(xlabel="step", ylabel="tokens/s, all ranks")
    memory.set(xlabel="step", ylabel="GiB of a rank, peak")
    for axes in (speed, memory):
        tidy(axes)
        axes.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(lambda value, _: short_numbers(value))
    legend_below(figure, speed, ncols=2)
    return figure


def scores_figure(results: Mapping[str, Any]) -> Figure:
    """Draw every metric's paired differences, with their intervals: one panel for accuracies, one a metric of text.

    Args:
        results: result of `collect_results`.
    """
    from matplotlib.figure import Figure

    pairs = {f"{b}_minus_{a}": f"{MODELS[b]} - {MODELS[a]}" for a, b in PAIRS if f"{b}_minus_{a}" in results["paired"]}
    panels: dict[str, list[str]] = {}
    for metric in next(iter(results["paired"].values())):
        kind = metric.rpartition("/")[2]
        panels.setdefault("accuracy" if kind.startswith(("acc", "exact_match")) else kind, []).append(metric)
    height = sum(0.8 + 0.5 * len(names) for names in panels.values()) + 0.9
    figure = Figure(figsize=(_WIDE_IN, height), layout="constrained")
    axes_of = figure.subplots(
        len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [0.5 + len(names) for names in panels.values()]}
    )[:, 0]
    for axes, (title, names) in zip(axes_of, panels.items(), strict=True):
        for place, (pair, label) in enumerate(pairs.items()):
            found = [results["paired"][pair][name] for name in names]
            axes.errorbar(
                [one["difference"] for one in found],
                [row + (place - (len(pairs) - 1) / 2) * 0.18 for row in range(len(names))],
                xerr=[math.nan if one["low"] is None else (one["high"] - one["low"]) / 2 for one in found],
                fmt="o",
                markersize=4,
                capsize=2,
                color=_PAIR_COLOURS[place],
                label=label,
            )
        better = "right" if results["paired"][next(iter(pairs))][names[0]]["higher_is_better"] else "left"
        axes.axvline(0, color="#999999", linewidth=1)
        axes.set_yticks(range(len(names)), [_tick(markdown.label(name)) for name in names], fontsize=SMALL)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(f"difference in {title.replace('_', ' ')} ({better}: better)")
        axes.xaxis.get_major_locator().set_params(nbins=5)
        tidy(axes, axis="x")
    legend_below(figure, axes_of[0], ncols=1)
    return figure


def _tick(text: str) -> str:
    """Return a label that leaves room for the figure, and is no formula, whatever its task is called."""
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return textwrap.fill(short.replace("$", r"\$"), _LINE)


def heldout_figure(curves: Mapping[str, Curve]) -> Figure | None:
    """Draw bits per byte of held-out text over tokens, with 95 % intervals over documents; None without a score.

    Args:
        curves: stage -> curve, for `pretrain` and perhaps `dense_ct`.
    """
    from matplotlib.figure import Figure

    scored = {stage: curve.scores for stage, curve in curves.items() if curve.scores}
    if not scored:
        return None
    figure = Figure(figsize=(_WIDE_IN, 3.5), layout="constrained")
    axes = figure.subplots()
    for stage, scores in scored.items():
        name, colour, marker = STYLES[stage]
        tokens, values, errors = zip(*scores, strict=True)
        axes.plot(tokens, values, color=colour, marker=marker, markersize=4, label=name)
        low, high = (
            [value + side * (error or 0.0) for value, error in zip(values, errors, strict=True)]
            for side in (-markdown.HALF, markdown.HALF)
        )
        axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    tokens_axis(axes, max(curves[stage].steps[-1]["tokens"] for stage in scored))
    axes.set_ylabel("bits per byte of held-out text")
    axes.set_title("95 % intervals over documents", fontsize=10)
    legend_below(figure, axes, ncols=2)
    return figure


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    return drawn.getvalue()
