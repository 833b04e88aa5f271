"""End a training whose loss or gradients are not numbers any more, and report spikes of its loss."""

# No postponed annotations: NeMo-Run parses `trainer.callbacks[0].stop_on_spike=true` by them.

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

    Megatron's own check (`ddp.check_for_nan_in_grad`) looks at every bucket of gradients on every rank, and the rank
    that finds something ends alone while the others wait for it. Here the first rank looks at two numbers that are
    sums over all ranks, and all end together. Megatron's tells which rank computes the value first, in a new run.

    A spike, see `LossSpikes`, is a warning and a line in `metrics.jsonl`.

    Args:
        window: how many losses are looked back at.
        threshold: spreads above their median that make a spike.
        stop_on_spike: end the run as after a loss that is not finite. To go on by itself is the default, because most
            spikes pass.

    Example:
        >>> recipe.trainer.callbacks.insert(0, run.Config(LossGuard, stop_on_spike=True))  # doctest: +SKIP
    """

    def __init__(self, window: int = 128, threshold: float = 8.0, stop_on_spike: bool = False) -> None:
        self.stop_on_spike = stop_on_spike
        self._spikes = LossSpikes(window, threshold)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the step's numbers on the first rank, and act alike on all.

        Raises:
            UpcycleError: a number is not finite, or the loss is a spike and the run shall end.
        """
        found = self._judge(trainer) if trainer.is_global_zero else None
        broken = torch.tensor(int(found is not None), device=torch.cuda.current_device())
        torch.distributed.broadcast(broken, 0)
        if not broken.item():
            return
        what, got, expected = trainer.strategy.broadcast(found or ("", 0.0, ""))
        checkpoints: Any = getattr(trainer.strategy, "checkpoint_io", None)
        if hasattr(checkpoints, "maybe_finalize_save_checkpoint"):  # one that is still being written is a good one
            checkpoints.maybe_finalize_save_checkpoint(blocking=True)
        kept = newest_checkpoint(Path(AppState().log_dir) / "checkpoints")
        optim: Any = pl_module.optim
        raise UpcycleError(
            f"{what} of step {trainer.global_step}",
            got=got,
            expected=expected,
            fix=f"the last good checkpoint is {kept or 'the dense one'}. "
            + how_to_go_on(Path(AppState().log_dir), "nemo", optim.config.lr),
        )

    def _judge(self, trainer: pl.Trainer) -> tuple[str, float, str] | None:
        """Return the number for which a step must end the run, or None: its name, value, and what was expected."""
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
