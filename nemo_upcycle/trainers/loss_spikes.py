"""Find spikes of the loss, and report them."""

from __future__ import annotations

import statistics
from collections import deque
from pathlib import Path

from nemo_upcycle.trainers.metrics_file import METRICS, append_line
from nemo_upcycle.utils.progress import show_messages


#: Number of losses needed before a loss can be called a spike.
LEAST = 20


class LossSpikes:
    """Finds spikes by comparing each loss with the last losses of a training.

    A spike is a loss above `median + threshold * spread` of the last losses. The spread is the median distance of
    these losses from their median, scaled to a standard deviation, and at least 1 % of the median. A resumed run
    starts with an empty window.

    Args:
        window: number of previous losses that a loss is compared with.
        threshold: number of spreads above the median that a spike exceeds.
    """

    def __init__(self, window: int = 128, threshold: float = 8.0) -> None:
        self._threshold = threshold
        self._losses: deque[float] = deque(maxlen=window)

    def add(self, step: int, loss: float, folder: Path | None) -> float | None:
        """Add a step's loss; for a spike, warn and write a line `step`, `loss_spike`, `limit` to `metrics.jsonl`.

        Args:
            step: number of the step.
            loss: loss of the step, a finite number.
            folder: folder of the training; None if another rank warns and writes.

        Returns:
            The limit that the loss exceeds; None if the loss is no spike.
        """
        limit = self.limit()
        if limit is None or loss <= limit:
            self._losses.append(loss)
            return None
        self._losses.append(limit)  # a lasting rise moves the window, but a single spike does not
        if folder:
            show_messages().warning("step %d: loss spike: %.4f, above %.4f", step, loss, limit)
            line = {"step": step, "loss_spike": round(loss, 6), "limit": round(limit, 6)}
            append_line(folder / METRICS, line)
        return limit

    def limit(self) -> float | None:
        """Return the limit above which the next loss is a spike; None while too few losses are known."""
        if len(self._losses) < LEAST:
            return None
        middle = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + self._threshold * max(deviation, 0.01 * middle)
