"""The checkpoints that a run keeps: the newest few, and one every N steps for good."""

# Do not postpone annotations here, and use Optional: NeMo-Run needs annotations to parse `log.ckpt.keep_every=5000`.

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
from nemo import lightning as nl
from nemo.lightning.ckpt_utils import ckpt_to_dir

from nemo_upcycle.sources.checkpoints import LAST, by_step
from nemo_upcycle.sources.checksums import write_checksums
from nemo_upcycle.trainers.kept_checkpoints import kept_for_good, removable


class RetainedCheckpoints(nl.ModelCheckpoint):
    """NeMo's checkpoint callback, able to keep earlier checkpoints as well.

    The last checkpoint is named `...-last`, as in NeMo. When a newer checkpoint is complete, the earlier one loses
    this suffix. A checkpoint is removed when it is no longer among the `keep_last` newest, unless `keep_every` keeps
    it. The removal starts only after the newer checkpoint is complete, so a run that keeps one checkpoint needs room
    for two, and a run that keeps two needs room for three.

    Args:
        keep_last: number of newest checkpoints to keep, including the last one.
        keep_every: steps between two checkpoints that are kept for good, for rewinds and for ablations from the middle
            of a run; see `kept_for_good`.
        settings: arguments of `nl.ModelCheckpoint`; `save_last` must be true and `save_top_k` zero.

    Example:
        >>> recipe.log.ckpt = run.Config(RetainedCheckpoints, keep_last=2, keep_every=5000, ...)  # doctest: +SKIP
    """

    def __init__(self, keep_last: int = 1, keep_every: Optional[int] = None, **settings: Any) -> None:  # noqa: UP045
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._begun: set[str] = set()  # removals that this process began; a thread may still be deleting the files
        super().__init__(**settings)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a checkpoint at the end of every training. NeMo does so only if the last validation is switched on."""
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_end(trainer, pl_module)

    def _get_finalize_save_checkpoint_callback(
        self, trainer: pl.Trainer, filepath: str, global_step: int
    ) -> Callable[[], None]:
        """Return NeMo's end of a save, preceded by the checksums of the files that this rank has written."""
        finish = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)

        def finish_with_checksums() -> None:
            write_checksums(Path(ckpt_to_dir(filepath)), trainer.global_rank)
            finish()

        return finish_with_checksums

    def nemo_topk_check_previous_run(self) -> None:
        """Do nothing, because NeMo would treat every checkpoint without `-last` as one of the best checkpoints."""

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str, override_async: bool = False) -> None:
        """Rename the checkpoint that was the last, and remove the checkpoints that need not be kept."""
        replaced = Path(ckpt_to_dir(filepath))
        if (self.async_save and not override_async) or not replaced.name.endswith(LAST):
            super()._remove_checkpoint(trainer, filepath, override_async)
            return
        if self.keep_last == 1 and replaced not in kept_for_good(by_step(replaced.parent), self.keep_every):
            super()._remove_checkpoint(trainer, filepath, override_async)
            return
        removable: list[str] = []
        if trainer.is_global_zero:
            if replaced.is_dir():
                replaced.rename(replaced.with_name(replaced.name.removesuffix(LAST)))
            removable = [str(path) for path in self._removable(replaced.parent)]
            self._begun.update(removable)
        for path in trainer.strategy.broadcast(removable):
            super()._remove_checkpoint(trainer, path, override_async)

    def _removable(self, folder: Path) -> list[Path]:
        """Return the checkpoints to remove, without those that this process is already removing."""
        present = by_step(folder)
        earlier = [path for path in present if not path.name.endswith(LAST)]
        found = removable(earlier, self.keep_last - 1, kept_for_good(present, self.keep_every))
        return [path for path in found if str(path) not in self._begun]
