"""The figures of a report, in colours that colour-blind readers tell apart (Okabe-Ito, purple to orange)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.reporting.run_folder import Curve


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = {"pretrain": ("MoE", "#0072B2"), "dense_ct": ("dense twin", "#D55E00")}
_DPI = 150


def draw_losses(curves: Mapping[str, Curve], path: Path) -> None:
    """Draw training and validation loss over tokens, for the upcycled model and its dense twin.

    Args:
        curves: by stage, `pretrain` and perhaps `dense_ct`.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for stage, curve in curves.items():
        name, colour = _STYLES[stage]
        tokens = [line["tokens"] for line in curve.steps]
        axes.plot(tokens, [line["loss"] for line in curve.steps], color=colour, alpha=0.45, label=f"{name}, training")
        if curve.validation:
            axes.plot(
                *zip(*curve.validation, strict=True),
                color=colour,
                marker="o" if stage == "pretrain" else "s",
                linewidth=2,
                label=f"{name}, validation",
            )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title="Loss of the upcycled MoE and its dense twin")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def draw_expert_load(curve: Curve, path: Path) -> bool:
    """Draw each expert's share of the token slots of each layer, at the first and the last step.

    Args:
        curve: of a training stage.
        path: the PNG to write.

    Returns:
        False, and nothing is written, when the stage has no experts.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    steps = [line for line in curve.steps if line.get("expert_load")]
    if not steps:
        return False
    balanced = 1 / len(steps[0]["expert_load"][0])
    highest = max(share for line in (steps[0], steps[-1]) for row in line["expert_load"] for share in row)
    highest = max(highest, 1.01 * balanced)
    norm = TwoSlopeNorm(balanced, vmin=0, vmax=highest)
    layers = len(steps[0]["expert_load"])
    figure = Figure(figsize=(8, min(12, 2.2 + 0.18 * layers)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    image: Any = None
    for axes, line in zip(panels, (steps[0], steps[-1]), strict=True):
        image = _draw_load(axes, line, norm)
    panels[0].set_ylabel("layer")
    figure.suptitle("Share of the token slots that each expert was given")
    bar = figure.colorbar(image, ax=panels, label="share of the layer's token slots")
    bar.ax.axhline(balanced, color="black", linewidth=1.5)
    ticks = [0, balanced / 2, balanced, (balanced + highest) / 2, highest]
    labels = [f"{100 * tick:.3g} %" + (" = 1/E, balanced" if tick == balanced else "") for tick in ticks]
    bar.set_ticks(ticks, labels=labels)
    _save(figure, path)
    return True


def _draw_load(axes: Axes, line: dict[str, Any], norm: Any) -> Any:
    """Draw one step; rows of zeros (layers without experts) stay blank."""
    load_LE = [row if any(row) else [float("nan")] * len(row) for row in line["expert_load"]]
    image = axes.imshow(load_LE, norm=norm, cmap="PuOr_r", aspect="auto", interpolation="none")
    layers, experts = len(load_LE), len(load_LE[0])
    axes.set(title=f"step {line['step']}", xlabel="expert")
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    axes.set_yticks(range(0, layers, max(1, layers // 16)))
    return image


def _save(figure: Figure, path: Path) -> None:
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(aside, dpi=_DPI)
    aside.replace(path)
