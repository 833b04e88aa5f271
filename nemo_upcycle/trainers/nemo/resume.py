"""The choice of the checkpoint that a restarted run resumes from: NeMo's `AutoResume`, safe after any kill."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nemo import lightning as nl
from nemo.utils.app_state import AppState

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.checkpoints import LAST, by_step, is_marked, set_aside, step_of, was_saved
from nemo_upcycle.sources.checksums import trusted_checkpoint


logger = logging.getLogger(__name__)
#: Key under which the first rank tells the others its choice, and the prefix that marks the value as an error.
_CHOSEN, _ERROR = "nemo_upcycle/checkpoint", "error: "


@dataclass(kw_only=True)
class UpcycleResume(nl.AutoResume):
    """NeMo's `AutoResume`, changed to resume from the complete checkpoint with the highest step after any kill.

    NeMo's class takes the newest folder without an `-unfinished` marker, so it can take a half-removed checkpoint.
    NeMo's class also refuses to start again if the only checkpoint is unfinished because the run was killed in its
    first save. Here such a run starts again from its `restore_config`. NeMo deletes marked checkpoints when training
    starts. Other incomplete checkpoints, and complete `-last` checkpoints of earlier steps, are moved aside.

    Only the first rank looks at the folder, and tells the other ranks its choice. On a shared file system, each rank
    may see a different state of the folder.

    Takes the arguments of `nl.AutoResume`.

    Example:
        >>> recipe.resume = run.Config(UpcycleResume, resume_if_exists=True)  # doctest: +SKIP
    """

    _strategy = None

    def setup(self, trainer: Any, model: Any = None) -> None:
        """Choose a checkpoint, and point the trainer to it."""
        self._strategy = trainer.strategy
        super().setup(trainer, model)

    def _find_trainer_ckpt_path(self) -> Path | None:
        return _chosen_by_first(self._strategy, self._choose) if self._strategy else self._choose()

    def _choose(self) -> Path | None:
        folder = Path(self.resume_from_directory or Path(AppState().log_dir) / "checkpoints")
        found = by_step(folder)
        if not found or any(step_of(path) is None for path in found):
            # NeMo itself handles checkpoints at msc:// addresses.
            # A checkpoint without a step in its name overwrites the checkpoint before it. If the new checkpoint
            # is unfinished, the training is lost, and NeMo is right to refuse a new start.
            return super()._find_trainer_ckpt_path()
        chosen = trusted_checkpoint(folder, set_aside)
        found = by_step(folder)
        if chosen is None:
            _require_never_saved(found)
        _move_aside(found, chosen)
        return chosen


def _chosen_by_first(strategy: Any, choose: Callable[[], Path | None]) -> Path | None:
    """Let the first rank of a job choose a path, and return it on every rank.

    There is no process group yet, so the ranks exchange the path through the store that their process group will use.

    Args:
        strategy: strategy of the trainer; its process group takes over the store.
        choose: function that chooses the path, called only on the first rank.

    Raises:
        CheckpointError: `choose` raised this error on the first rank; every rank then raises it.
    """
    ranks = strategy.cluster_environment
    if not ranks.creates_processes_externally or ranks.world_size() == 1:
        return choose()
    if strategy.store is None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = ranks.main_address, str(ranks.main_port)
        address = f"env://?rank={ranks.global_rank()}&world_size={ranks.world_size()}"
        strategy.store = next(torch.distributed.rendezvous(address))[0]
    if ranks.global_rank() == 0:
        try:
            chosen = choose()
        except CheckpointError as error:
            strategy.store.set(_CHOSEN, f"{_ERROR}{error}")
            raise
        strategy.store.set(_CHOSEN, str(chosen or ""))
        return chosen
    told = strategy.store.get(_CHOSEN).decode()
    if told.startswith(_ERROR):
        raise CheckpointError(told.removeprefix(_ERROR))
    return Path(told) if told else None


def _require_never_saved(found: list[Path]) -> None:
    """Check that starting from the dense checkpoint loses no training.

    Raises:
        CheckpointError: a checkpoint that was complete is now damaged, and no other checkpoint is complete.
    """
    damaged = [path for path in found if was_saved(path) and not is_marked(path)]
    if damaged:
        raise CheckpointError(
            f"Checkpoint {damaged[-1]}",
            kind="state",
            got="lacks files that its metadata names",
            fix=f"restore these files, or move {damaged[-1]} away to start from the dense checkpoint again",
        )


def _move_aside(found: list[Path], chosen: Path | None) -> None:
    """Move the checkpoints that this run must not read again to `checkpoints_aside`; only the first rank does so."""
    for path in found:
        superseded = chosen is not None and path.name.endswith(LAST) and path != chosen
        if is_marked(path) or path == chosen or (was_saved(path) and not superseded):
            continue
        logger.warning(
            "%s is %s and was moved to %s",
            path,
            "older than the checkpoint to resume from" if superseded else "unfinished",
            set_aside(path),
        )
