"""The checkpoints that a training keeps: the newest few, one every N steps, and those that it was rewound to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_upcycle.sources.checkpoints import is_complete_checkpoint, steps_in
from nemo_upcycle.trainers.lineage import read_branches


def kept_for_good(checkpoints: Sequence[Path], keep_every: int | None) -> set[Path]:
    """Return the checkpoints that are never removed.

    Args:
        checkpoints: checkpoints in `checkpoints` of a training's folder, sorted by step.
        keep_every: steps between two checkpoints to keep: the first checkpoint after each multiple of this number.
            0 or None: only the checkpoints that the training was rewound to are kept.

    Example:
        >>> paths = [Path(f"run/checkpoints/iter_{step:07d}") for step in (300, 600, 900, 1200)]
        >>> sorted(path.name for path in kept_for_good(paths, 500))
        ['iter_0000600', 'iter_0001200']
    """
    if not checkpoints:
        return set()
    rewound = {branch.step for branch in read_branches(checkpoints[0].parent.parent)}
    kept = {path for path in checkpoints if steps_in(path) in rewound}
    if keep_every:
        parts = {steps_in(path) // keep_every: path for path in reversed(checkpoints)}
        kept |= {path for part, path in parts.items() if part}
    return kept


def removable(checkpoints: Sequence[Path], keep_last: int, kept: set[Path]) -> list[Path]:
    """Return the checkpoints to remove. An incomplete checkpoint is the rest of an interrupted removal.

    Args:
        checkpoints: checkpoints of a training, sorted by step.
        keep_last: number of the newest complete checkpoints that stay.
        kept: further checkpoints that stay.
    """
    whole = [path for path in checkpoints if is_complete_checkpoint(path)]
    if len(whole) < keep_last:
        return []
    older = checkpoints[: checkpoints.index(whole[-keep_last])] if keep_last else checkpoints
    return [path for path in older if path not in kept]


def count_kept(keep_last: int, keep_every: int | None, steps: int) -> int:
    """Return the number of checkpoints that stay at the end of a training.

    Example:
        >>> count_kept(2, 5000, 23_842)
        6
    """
    return keep_last + (steps // keep_every if keep_every else 0)
