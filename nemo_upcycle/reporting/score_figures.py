"""Figures of what the models score: every metric with its error, and held-out text while they were trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_upcycle.reporting.figures import STYLES, legend_below, tokens_axis
from nemo_upcycle.reporting.markdown import label
from nemo_upcycle.reporting.run_folder import MODELS, Curve


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "dense": "#000000",
    "step0": "#56B4E9",
    "trained": STYLES["pretrain"][1],
    "dense_ct": STYLES["dense_ct"][1],
}
#: Half of a 95 % interval in standard errors.
_WIDTH = 1.96
#: Characters of a metric's label.
_LONGEST = 50


def scores_figure(results: Mapping[str, Any]) -> Figure:
    """Return every metric of every model, with 95 % intervals: one panel for accuracies, one a metric of text.

    Args:
        results: what `collect_results` returned.
    """
    from matplotlib.figure import Figure

    metrics = list(next(iter(results["paired"].values())))
    panels: dict[str, list[str]] = {}
    for metric in metrics:
        kind = metric.rpartition("/")[2]
        panels.setdefault("accuracy" if kind.startswith(("acc", "exact_match")) else kind, []).append(metric)
    models = [name for name in MODELS if name in results["evaluation"]]
    figure = Figure(figsize=(9, sum(0.8 + 0.45 * len(names) for names in panels.values()) + 0.5), layout="constrained")
    axes_of = figure.subplots(
        len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [0.5 + len(names) for names in panels.values()]}
    )[:, 0]
    for axes, (title, names) in zip(axes_of, panels.items(), strict=True):
        for place, model in enumerate(models):
            found = [results["evaluation"][model][name] for name in names]
            axes.errorbar(
                [one["value"] for one in found],
                [row + (place - (len(models) - 1) / 2) * 0.18 for row in range(len(names))],
                xerr=[_WIDTH * (one["stderr"] or 0.0) for one in found],
                fmt="o",
                markersize=4,
                capsize=2,
                color=_COLOURS[model],
                label=MODELS[model],
            )
        axes.set_yticks(range(len(names)), [_tick(label(name)) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(title.replace("_", " "))
        axes.grid(alpha=0.3, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    axes_of[0].legend(fontsize=8, frameon=False, ncols=len(models), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _tick(text: str) -> str:
    """Return a label that leaves room for the figure, and is no formula, whatever its task is called."""
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return short.replace("$", r"\$")


def heldout_figure(curves: Mapping[str, Curve]) -> Figure | None:
    """Return bits per byte of held-out text over tokens, with 95 % intervals over documents; None of no score.

    Args:
        curves: by stage, `pretrain` and perhaps `dense_ct`.
    """
    from matplotlib.figure import Figure

    scored = {stage: curve.scores for stage, curve in curves.items() if curve.scores}
    if not scored:
        return None
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for stage, scores in scored.items():
        name, colour, marker = STYLES[stage]
        tokens, values, errors = zip(*scores, strict=True)
        axes.plot(tokens, values, color=colour, marker=marker, markersize=4, label=name)
        low, high = (
            [value + side * (error or 0.0) for value, error in zip(values, errors, strict=True)]
            for side in (-_WIDTH, _WIDTH)
        )
        axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    tokens_axis(axes, max(curves[stage].steps[-1]["tokens"] for stage in scored))
    axes.set_ylabel("bits per byte of held-out text")
    axes.set_title("95 % intervals over documents", fontsize=10)
    legend_below(figure, axes, ncols=2)
    return figure
