"""Faults of a drawn figure: parts that are cut, and parts that cover other parts."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg


def faults_of(figure: Any) -> list[str]:
    """Return the faults of a figure: cut parts, legends over panels, overlapping panels, colliding tick labels."""
    FigureCanvasAgg(figure).draw()
    inside = figure.bbox.padded(1)
    panels = [(axes.get_title() or axes.get_ylabel(), axes.get_tightbbox()) for axes in figure.axes]
    parts = [figure, *figure.subfigs]
    legends = [legend.get_window_extent() for part in parts for legend in part.legends]
    titles = [part._suptitle.get_window_extent() for part in parts if part._suptitle is not None]
    boxes = [*panels, *(("a legend", box) for box in legends), *(("the title", box) for box in titles)]
    found = [f"{name} is cut" for name, box in boxes if (box.min < inside.min).any() or (box.max > inside.max).any()]
    found += [f"a legend covers {name}" for name, box in panels for legend in legends if box.overlaps(legend)]
    found += [f"two panels overlap: {one[0]}" for one, two in itertools.combinations(panels, 2) if _collide(one, two)]
    for axes in figure.axes:
        low, high = sorted(axes.get_xlim())
        labels = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        spans = sorted((box.x0, box.x1) for box in (label.get_window_extent() for label in labels if label.get_text()))
        if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
            found.append(f"labels collide below {axes.get_title() or axes.get_xlabel()}")
    return found


def _collide(one: tuple[str, Any], two: tuple[str, Any]) -> bool:
    return bool(one[1].padded(-1).overlaps(two[1].padded(-1)))
