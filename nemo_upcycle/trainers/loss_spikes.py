"""Find spikes of the loss, and report them."""

from __future__ import annotations

import statistics
from collections import deque
from pathlib import Path

from nemo_upcycle.sources.checkpoints import steps_in
from nemo_upcycle.trainers.metrics_file import METRICS, append_line
from nemo_upcycle.trainers.settings import LR
from nemo_upcycle.utils.command_line import COMMAND, CommandLine
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


def how_to_go_on(folder: Path, trainer: str, rate: float, step: int, kept: Path | None) -> str:
    """Explain how to continue after a loss ended a training: resume, or train with half the learning rate.

    Args:
        folder: folder of the training, which may be inside a run's folder.
        trainer: `nemo` or `bridge`.
        rate: highest learning rate of the training.
        step: step whose loss ended the training.
        kept: newest checkpoint before this step; None if no checkpoint was kept.
    """
    noted, name = folder.parent / COMMAND, LR.of(trainer)
    typed = CommandLine.read(noted.read_text(encoding="utf-8")) if noted.is_file() else None
    lower = {f"{folder.name}.{name}": f"{rate / 2:g}"}
    if typed and kept:
        place = f"{folder.name}:{steps_in(kept)}" if folder.name != "pretrain" else steps_in(kept)
        then = (
            f"rewind it with a lower {name}: `{typed.changed(lower, f'--rewind {place} --yes')}`. "
            f"To leave out the samples of this step, add --skip-steps {step}"
        )
    else:
        then = f"train in a new folder with a lower {name}"
        then += f": `{typed.changed({'dir': f'{folder.parent}-lower-rate'} | lower)}`" if typed else ""
    return f"Start again to resume from it; if the loss fails at the same step again, {then}"
