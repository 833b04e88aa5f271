"""README's picture: what a rank reads of a dense model, what it makes of it, and what is known of the gain.

python -m benchmarks.readme_picture      docs/upcycling.png; the numbers are those of docs/results/budget
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


ROOT = Path(__file__).parents[1]
TABLE, PICTURE = ROOT / "docs/results/budget/table.json", ROOT / "docs/upcycling.png"
#: Arms of the grid: tokens of the parent, in millions.
PARENTS = {"moe_2m": "2.5M", "moe_5m": "5M", "moe_10m": "10M", "moe_20m": "20M"}
#: The paper's MMLU of Llama 3 8B, before and after (arXiv 2412.09952).
PAPER = (62.1, 64.1)
RANKS, EXPERTS = 4, 8
INK, GREY, BLUE, ORANGE, PALE = "#1f2328", "#8c959f", "#0969da", "#d9730d", "#f6f8fa"
LARGE, SMALL = 23, 18.5


def _box(axes: Any, left: float, low: float, size: tuple[float, float], text: str = "", fill: str = PALE) -> None:
    width, height = size
    style = "round,pad=0,rounding_size=0.12"
    ink = "white" if fill in (BLUE, ORANGE, GREY) else INK
    axes.add_patch(FancyBboxPatch((left, low), width, height, boxstyle=style, facecolor=fill, edgecolor=INK, lw=1.2))
    axes.text(left + width / 2, low + height / 2, text, ha="center", va="center", color=ink, fontsize=SMALL)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=18, color=INK, lw=1.6))


def _draw_upcycling(axes: Any) -> None:
    """Draw the dense network, the ranks with their experts, and the model that they are together."""
    axes.set(xlim=(-0.5, 16), ylim=(-0.1, 7.2))
    axes.axis("off")
    for place, title in ((1.65, "dense model"), (7.6, "each rank reads\nits slices alone"), (13.9, "trained MoE")):
        axes.text(place, 6.9, title, ha="center", va="top", fontsize=LARGE, weight="bold", color=INK)
    _box(axes, 0.2, 0.9, (2.8, 1.9), "attention", GREY)
    _box(axes, 0.2, 3.0, (2.8, 1.9), "network", BLUE)
    for rank in range(RANKS):
        low = 4.2 - 1.4 * rank
        _arrow(axes, (3.1, 3.9 - 0.25 * rank), (5.0, low + 0.6))
        _box(axes, 5.1, low, (1.5, 1.2), f"rank {rank}")
        for place in range(EXPERTS // RANKS):
            _box(axes, 6.8 + 1.7 * place, low, (1.5, 1.2), f"expert\n{rank * 2 + place + 1}", BLUE)
        _arrow(axes, (10.3, low + 0.6), (11.9, 3.6 - 0.25 * rank))
    _box(axes, 12.1, 0.9, (3.6, 1.3), "attention", GREY)
    _box(axes, 12.1, 2.35, (3.6, 0.8), "router: top-2")
    for number in range(EXPERTS):
        fill = ORANGE if number in (1, 6) else BLUE
        _box(axes, 12.1 + 0.925 * (number % 4), 4.15 - 0.85 * (number // 4), (0.825, 0.75), fill=fill)


def _draw_gain(axes: Any, differences: dict[str, Any]) -> None:
    """Draw the difference to the parent trained on, by the tokens that the parent had seen."""
    ends = [differences[arm]["end"] for arm in PARENTS]
    gains = [-end["difference"] for end in ends]
    errors = [(end["high"] - end["low"]) / 2 for end in ends]
    bars = axes.barh(range(len(ends)), gains, xerr=errors, color=BLUE, ecolor=INK, capsize=4, height=0.62)
    axes.bar_label(bars, [f"{gain:.3f}" for gain in gains], padding=8, fontsize=SMALL, color=INK)
    axes.set_yticks(range(len(ends)), PARENTS.values(), fontsize=SMALL)
    axes.set(xlim=(0, 0.16))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_ylabel("parent's tokens", fontsize=SMALL)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title("ours, 1M model: bits per byte\nbelow the parent, equal tokens", fontsize=SMALL, loc="left")


def main() -> None:
    """Draw it."""
    figure = Figure(figsize=(10, 8.2), facecolor="white")
    top, left, right = (
        figure.add_axes(place)
        for place in ((0.01, 0.42, 0.98, 0.57), (0.02, 0.02, 0.36, 0.34), (0.52, 0.02, 0.46, 0.27))
    )
    _draw_upcycling(top)
    left.axis("off")
    before, after = PAPER
    left.text(0.5, 0.74, f"{before} → {after}", ha="center", fontsize=38, weight="bold", color=BLUE)
    left.text(0.5, 0.2, "the paper's MMLU:\nLlama 3 8B, 8 experts\n(arXiv 2412.09952)", ha="center", fontsize=SMALL)
    _draw_gain(right, json.loads(TABLE.read_text(encoding="utf-8"))["differences"])
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
