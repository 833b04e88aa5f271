"""End a training job on SIGTERM, Ctrl-C or a full disk, and print which checkpoint is kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from nemo import lightning as nl
from nemo.utils.app_state import AppState

from nemo_upcycle.errors import StageStopped
from nemo_upcycle.sources.checkpoints import full_disk, newest_checkpoint, steps_in
from nemo_upcycle.utils.children import shield_children


class StopOnSignal(Callback):
    """Ends this rank on SIGTERM and SIGINT; the first rank prints which checkpoint the run will resume from.

    If the disk is full, the error says so and names the same checkpoint.

    Without this callback Lightning looks at a SIGTERM only between two steps, so a job that hangs cannot be ended.
    `SaveOnSignal` and NeMo's `PreemptionCallback` save before they end the run. They set their own SIGTERM handler
    when training starts. Until then, and for SIGINT, this callback's handler acts.

    Example:
        >>> recipe.trainer.callbacks.append(run.Config(StopOnSignal))  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the handlers before weights are read."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread set handlers
        owner = os.getpid()

        def stop(signum: int, frame: FrameType | None) -> None:
            if os.getpid() == owner:  # skip in a forked checkpoint writer, which inherits the handler
                _say_last_words(signum, trainer)
                for child in multiprocessing.active_children():
                    child.kill()
                    child.join(1)  # wait, so that no process is left when the job has ended
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

        self._before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Replace the error of a full disk with an error that says so and names the checkpoint that is kept.

        Raises:
            UnfinishedError: the disk is full.
        """
        if (log_dir := AppState().log_dir) and (full := full_disk(exception, Path(log_dir) / "checkpoints")):
            raise full from None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the earlier handlers."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


class SaveOnSignal(nl.pytorch.callbacks.PreemptionCallback):
    """Saves a checkpoint after the current step on SIGTERM, then ends this process with status 75.

    It differs from NeMo's `PreemptionCallback` in four ways:

    - A signal to any rank counts. NeMo's callback obeys only a signal to rank 0, so the steps since the last
      checkpoint are lost if only another node is preempted.
    - Data loaders survive the signal, which a scheduler sends to all processes of a job.
    - The handler stays until training is torn down. NeMo removes its handler before the last checkpoint is written.
    - The exit status is 75, not 0, so that a scheduler does not take an early end for a finished training.

    Put this callback after `MetricsLogger`, so that the last step gets its line, and before `StopOnSignal`, which ends
    the process at once while there is nothing to save.

    Example:
        >>> recipe.trainer.callbacks += [run.Config(SaveOnSignal), run.Config(StopOnSignal)]  # doctest: +SKIP
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Protect data loaders from SIGTERM before they are started."""
        super().setup(trainer, pl_module, stage)
        shield_children()

    @property
    def interrupted(self) -> bool:
        """Whether any rank was told to stop; a collective call, so all ranks must ask."""
        told = torch.tensor(int(self._interrupted), device=torch.cuda.current_device())
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return bool(told.item())

    @contextmanager
    def _preemption_handler(self) -> Iterator[None]:
        def note(signum: int, frame: FrameType | None) -> None:
            self._interrupted = True  # a forked checkpoint writer sets only its own copy

        before = signal.signal(self.sig, note)
        try:
            yield
        finally:
            signal.signal(self.sig, before)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and end if a rank was told to stop."""
        try:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        except SystemExit:
            _say_last_words(self.sig, trainer)
            raise SystemExit(StageStopped.exit_status) from None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the handler, because the last checkpoint is written after this call."""

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the earlier handler."""
        super().on_train_end(trainer, pl_module)
        self._handler_context = None


def step_kept(folder: Path) -> int:
    """Return the number of steps in a training's newest complete checkpoint, the same on all ranks.

    Only this number tells whether a training is finished, because a process may end early with status 0. This
    function is a collective call, so all ranks must call it.

    Args:
        folder: the training's log folder, which contains `checkpoints`.

    Returns:
        The number of steps; 0 if no complete checkpoint has its step in its name.

    Example:
        >>> step_kept(Path("runs/mine/pretrain")) >= recipe.trainer.max_steps  # doctest: +SKIP
        True
    """
    shared = torch.distributed.is_initialized()
    answer = [0]
    if not shared or torch.distributed.get_rank() == 0:  # the first rank finishes checkpoints
        kept = newest_checkpoint(folder / "checkpoints")
        answer = [steps_in(kept) if kept else 0]
    if shared:
        torch.distributed.broadcast_object_list(answer)
    return answer[0]


def _say_last_words(signum: int, trainer: pl.Trainer) -> None:
    """Print on the first rank which checkpoint is kept by the job that ends now."""
    if not trainer.is_global_zero:
        return
    kept = newest_checkpoint(Path(AppState().log_dir) / "checkpoints")
    what = f"kept: {kept}" if kept else "no checkpoint is finished yet"
    go_on = "resumes from there" if kept else "starts again from the dense checkpoint"
    name = signal.Signals(signum).name
    step = f"after step {trainer.global_step} of {trainer.max_steps}"
    sys.stderr.write(f"\nStopped by {name} {step}; {what}. The same command {go_on}.\n")
    sys.stderr.flush()
