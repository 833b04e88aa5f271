"""Stop a training when its loss or gradient norm is not finite, and report loss spikes."""

# Do not postpone annotations here: NeMo-Run needs them to parse `trainer.callbacks[0].stop_on_spike=true`.

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from nemo.utils.app_state import AppState

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.trainers.loss_spikes import LossSpikes, how_to_go_on


class LossGuard(Callback):
    """Ends the run at the first step whose loss or gradient norm is not finite, before a checkpoint can be written.

    Megatron's own check (`ddp.check_for_nan_in_grad`) looks at every gradient bucket on every rank. The rank that
    finds a bad value ends, and the other ranks keep waiting for it. Here the first rank checks the loss and the
    gradient norm, which are already sums over all ranks, and all ranks end together. To learn which rank first
    computes the bad value, start a new run with Megatron's check.

    A loss spike (see `LossSpikes`) gives a warning and a line in `metrics.jsonl`.

    Args:
        window: number of recent losses that a loss is compared with.
        threshold: a loss is a spike if it is more than this number of spreads above the median of these losses.
        stop_on_spike: whether a spike ends the run as a non-finite loss does. By default the run continues, because
            most spikes pass.

    Example:
        >>> recipe.trainer.callbacks.insert(0, run.Config(LossGuard, stop_on_spike=True))  # doctest: +SKIP
    """

    def __init__(self, window: int = 128, threshold: float = 8.0, stop_on_spike: bool = False) -> None:
        self.stop_on_spike = stop_on_spike
        self._spikes = LossSpikes(window, threshold)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the step's loss and gradient norm on the first rank, and end all ranks together.

        Raises:
            UpcycleError: a number is not finite, or the loss is a spike and `stop_on_spike` is set.
        """
        found = self._judge(trainer) if trainer.is_global_zero else None
        broken = torch.tensor(int(found is not None), device=torch.cuda.current_device())
        torch.distributed.broadcast(broken, 0)
        if not broken.item():
            return
        what, got, expected = trainer.strategy.broadcast(found or ("", 0.0, ""))
        checkpoints: Any = getattr(trainer.strategy, "checkpoint_io", None)
        if hasattr(checkpoints, "maybe_finalize_save_checkpoint"):  # a checkpoint that is still being written is good
            checkpoints.maybe_finalize_save_checkpoint(blocking=True)
        kept = newest_checkpoint(Path(AppState().log_dir) / "checkpoints")
        optim: Any = pl_module.optim
        raise UpcycleError(
            f"{what} of step {trainer.global_step}",
            got=got,
            expected=expected,
            fix=f"the last good checkpoint is {kept or 'the dense checkpoint'}. "
            + how_to_go_on(Path(AppState().log_dir), "nemo", optim.config.lr, trainer.global_step, kept),
        )

    def _judge(self, trainer: pl.Trainer) -> tuple[str, float, str] | None:
        """Return the number that must end the run (its name, its value, the expectation); None to continue."""
        names = {"loss": "reduced_train_loss", "gradient norm": "grad_norm"}
        for what, name in names.items():
            value = trainer.callback_metrics.get(name)
            if value is not None and not math.isfinite(value):
                return what, float(value), "a finite number"
        logged = trainer.callback_metrics.get("reduced_train_loss")
        if logged is None:
            return None
        loss = float(logged)
        limit = self._spikes.add(trainer.global_step, loss, Path(AppState().log_dir))
        return ("loss", loss, f"at most {limit:.4f}") if limit and self.stop_on_spike else None
