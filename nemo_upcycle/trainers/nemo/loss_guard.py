"""Stop a training when its loss or gradient norm is not finite or a limit is exceeded, and report loss spikes."""

# Do not postpone annotations here, and use Optional: NeMo-Run needs them to parse `trainer.callbacks[0].window=64`.

import math
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from nemo.utils.app_state import AppState

from nemo_upcycle.trainers.loss_spikes import LossSpikes
from nemo_upcycle.trainers.nemo.metrics import MetricsLogger
from nemo_upcycle.trainers.stop_error import stop_error
from nemo_upcycle.trainers.stop_limits import LimitWatch, StopLimits, StopReason


class LossGuard(Callback):
    """Ends the run at the first step whose loss or gradient norm is not finite, before a checkpoint can be written.

    Megatron's own check (`ddp.check_for_nan_in_grad`) looks at every gradient bucket on every rank. The rank that
    finds a bad value ends, and the other ranks keep waiting for it. Here the first rank checks the loss and the
    gradient norm, which are already sums over all ranks, and all ranks end together. To learn which rank first
    computes the bad value, start a new run with Megatron's check.

    A loss spike (see `LossSpikes`) gives a warning and a line in `metrics.jsonl`.

    Unused experts, dropped tokens and a loss above the parent's can end the run, too; see `StopLimits`. These limits
    use the lines of `MetricsLogger`, so they act after the following step.

    Args:
        window: number of recent losses that a loss is compared with.
        threshold: a loss is a spike if it is more than this number of spreads above the median of these losses.
        stop_on_spike: whether a spike ends the run as a non-finite loss does. By default the run continues, because
            most spikes pass.
        min_expert_load: see `StopLimits`.
        max_dropped: see `StopLimits`.
        max_above_parent: see `StopLimits`.
        limit_steps: see `StopLimits`.

    Raises:
        SpecError: a limit is out of range.

    Example:
        >>> recipe.trainer.callbacks.insert(0, run.Config(LossGuard, stop_on_spike=True))  # doctest: +SKIP
    """

    def __init__(
        self,
        window: int = 128,
        threshold: float = 8.0,
        stop_on_spike: bool = False,
        min_expert_load: Optional[float] = None,  # noqa: UP045
        max_dropped: Optional[float] = None,  # noqa: UP045
        max_above_parent: Optional[float] = None,  # noqa: UP045
        limit_steps: int = 100,
    ) -> None:
        self.stop_on_spike = stop_on_spike
        self._spikes = LossSpikes(window, threshold)
        self._limits = StopLimits(min_expert_load, max_dropped, max_above_parent, limit_steps)
        self._limits.check()
        self._watch: LimitWatch | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting."""
        self._watch = LimitWatch(self._limits, Path(AppState().log_dir)) if self._limits.are_set else None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the step's loss and gradient norm on the first rank, and end all ranks together.

        Raises:
            UpcycleError: a number is not finite, the loss is a spike and `stop_on_spike` is set, or a limit is
                exceeded.
        """
        found = self._judge(trainer) if trainer.is_global_zero else None
        broken = torch.tensor(int(found is not None), device=torch.cuda.current_device())
        torch.distributed.broadcast(broken, 0)
        if not broken.item():
            return
        reason: StopReason = trainer.strategy.broadcast(found)  # type: ignore[assignment]
        checkpoints: Any = getattr(trainer.strategy, "checkpoint_io", None)
        if hasattr(checkpoints, "maybe_finalize_save_checkpoint"):  # a checkpoint that is still being written is good
            checkpoints.maybe_finalize_save_checkpoint(blocking=True)
        module: Any = pl_module
        raise stop_error(
            reason,
            Path(AppState().log_dir),
            "nemo",
            rate=module.optim.config.lr,
            aux_loss=getattr(module.config, "moe_aux_loss_coeff", None),
        )

    def _judge(self, trainer: pl.Trainer) -> StopReason | None:
        """Return the reason to end the run; None to continue."""
        step = trainer.global_step
        names = {"loss": "reduced_train_loss", "gradient norm": "grad_norm"}
        for what, name in names.items():
            value = trainer.callback_metrics.get(name)
            if value is not None and not math.isfinite(value):
                return StopReason(what, float(value), "a finite number", step, step)
        logged = trainer.callback_metrics.get("reduced_train_loss")
        if logged is None:
            return None
        loss = float(logged)
        limit = self._spikes.add(step, loss, Path(AppState().log_dir))
        if limit and self.stop_on_spike:
            return StopReason("loss", loss, f"at most {limit:.4f}", step, step)
        line = next((one.line for one in trainer.callbacks if isinstance(one, MetricsLogger)), None)  # type: ignore[attr-defined]
        return self._watch.add(line) if self._watch and line else None
