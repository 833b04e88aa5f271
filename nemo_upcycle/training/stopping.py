"""End a training job at once on SIGTERM and Ctrl-C, and print what it keeps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from nemo.utils.app_state import AppState

from nemo_upcycle.sources.checkpoints import newest_checkpoint


class StopOnSignal(Callback):
    """End this rank on SIGTERM and SIGINT; the first rank prints which checkpoint the run will resume from.

    Without it Lightning looks at a SIGTERM only between two steps, so a job that hangs cannot be ended. NeMo's
    `PreemptionCallback`, which saves before it ends, sets its own handler for SIGTERM and takes precedence.

    Example:
        >>> recipe.trainer.callbacks.append(run.Config(StopOnSignal))  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the handlers, before weights are read."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python takes handlers from the main thread only
        owner = os.getpid()

        def stop(signum: int, frame: FrameType | None) -> None:
            if os.getpid() == owner:  # and no checkpoint writer that it forked
                if trainer.is_global_zero:
                    sys.stderr.write(_last_words(signum, trainer))
                    sys.stderr.flush()
                for child in multiprocessing.active_children():
                    child.kill()
                    child.join(1)  # a job that has ended leaves nothing behind, not even for a moment
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

        self._before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the earlier handlers."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def _last_words(signum: int, trainer: pl.Trainer) -> str:
    kept = newest_checkpoint(Path(AppState().log_dir) / "checkpoints")
    what = f"kept: {kept}" if kept else "no checkpoint is finished yet"
    go_on = "goes on from there" if kept else "starts again from the dense checkpoint"
    name = signal.Signals(signum).name
    step = f"after step {trainer.global_step} of {trainer.max_steps}"
    return f"\nStopped by {name} {step}; {what}. The same command {go_on}.\n"
