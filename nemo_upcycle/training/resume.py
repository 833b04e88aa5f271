"""Choose the checkpoint that a restarted run resumes from: NeMo's `AutoResume` for runs killed at any moment."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from nemo import lightning as nl
from nemo.utils.app_state import AppState
from nemo.utils.get_rank import is_global_rank_zero

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.checkpoints import by_step, is_marked, newest_checkpoint, step_of, was_saved


logger = logging.getLogger(__name__)
#: A folder beside `checkpoints` whose content is never read again.
ASIDE = "checkpoints_aside"


@dataclass(kw_only=True)
class UpcycleResume(nl.AutoResume):
    """NeMo's `AutoResume` that resumes from the complete checkpoint of the highest step, whatever else a kill left.

    NeMo's own takes the newest folder without an `-unfinished` marker, so it can take one that was half removed; and
    it refuses to start again if the only checkpoint is unfinished because the run was killed in its first save. Such a
    run starts from its `restore_config` here, as at first. NeMo deletes marked checkpoints when training starts;
    other incomplete checkpoints, and complete `-last` ones of earlier steps, are moved aside.

    Takes the arguments of `nl.AutoResume`.

    Example:
        >>> recipe.resume = run.Config(UpcycleResume, resume_if_exists=True)  # doctest: +SKIP
    """

    def _find_trainer_ckpt_path(self) -> Path | None:
        folder = Path(self.resume_from_directory or Path(AppState().log_dir) / "checkpoints")
        found = by_step(folder)
        if not found or any(step_of(path) is None for path in found):  # NeMo handles msc:// too
            # A checkpoint without a step in its name overwrites the one before it: if it is unfinished, the training
            # is lost, and NeMo is right to refuse a new start.
            return super()._find_trainer_ckpt_path()
        chosen = newest_checkpoint(folder)
        if chosen is None:
            _require_never_saved(found)
        if is_global_rank_zero():
            _move_aside(found, chosen)
        return chosen


def _require_never_saved(found: list[Path]) -> None:
    """Check that starting from the dense checkpoint loses no training.

    Raises:
        CheckpointError: a checkpoint was complete once, and there is no other one.
    """
    damaged = [path for path in found if was_saved(path) and not is_marked(path)]
    if damaged:
        raise CheckpointError(
            str(damaged[-1]),
            got="a checkpoint that lacks files",
            expected="all that its metadata names",
            fix=f"restore its files, or move {damaged[-1]} away to start from the dense checkpoint again",
        )


def _move_aside(found: list[Path], chosen: Path | None) -> None:
    """Move what this run must not read again to `checkpoints_aside`; no other rank looks at it."""
    for path in found:
        superseded = chosen is not None and path.name.endswith("-last") and path != chosen
        if is_marked(path) or path == chosen or (was_saved(path) and not superseded):
            continue
        aside = path.parent.parent / ASIDE / path.name
        aside.parent.mkdir(exist_ok=True)
        number = 0
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{path.name}.{number}")
        path.rename(aside)
        logger.warning("%s is %s and was moved to %s", path, "an earlier one" if superseded else "unfinished", aside)
