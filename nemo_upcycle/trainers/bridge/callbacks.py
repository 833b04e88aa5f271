"""The callbacks of a training in Bridge: its metrics, and the features of `config.upcycle`."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from pathlib import Path

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.checkpointing import maybe_finalize_async_save
from megatron.bridge.training.config import ConfigContainer, TensorInspectConfig

from nemo_upcycle.sources.checkpoints import by_step
from nemo_upcycle.trainers.base import FT_SOCKET
from nemo_upcycle.trainers.bridge.metrics import BridgeEvaluations, BridgeMetrics, loss_on_last_rank
from nemo_upcycle.trainers.bridge.new_rates import NewRates
from nemo_upcycle.trainers.bridge.run_folder import save_checksums
from nemo_upcycle.trainers.bridge.settings import UpcycleSettings, mixed_precision_of, settings_of
from nemo_upcycle.trainers.facts import Evaluations
from nemo_upcycle.trainers.kept_checkpoints import kept_for_good, removable
from nemo_upcycle.trainers.loss_spikes import LossSpikes
from nemo_upcycle.trainers.monitoring.fp8_statistics import features, require_inspect
from nemo_upcycle.trainers.stop_error import stop_error
from nemo_upcycle.trainers.stop_limits import LimitWatch, StopReason


def upcycle_callbacks(config: ConfigContainer, folder: Path, evaluations: Evaluations | None = None) -> list[Callback]:
    """Return the callbacks of a run and complete its configuration for them, on every rank, before `pretrain`.

    Args:
        config: configuration of the run, changed in place: Bridge's own checks for NaN are switched off, and FP8
            statistics are switched on if they are wanted.
        folder: folder for `metrics.jsonl`, `training.json` and evaluations.
        evaluations: evaluations during training; None: the evaluations of `config.upcycle`.

    Raises:
        SpecError: a setting is out of range, or contradicts another setting.

    Example:
        >>> pretrain(config, forward_step, callbacks=upcycle_callbacks(config, folder))  # doctest: +SKIP
    """
    settings = settings_of(config)
    settings.check()
    _take_statistics(config, settings.fp8_statistics_every, folder)
    metrics = BridgeMetrics(folder)
    config.rerun_state_machine.check_for_nan_in_loss = config.ddp.check_for_nan_in_grad = False
    guard = BridgeLossGuard(settings, folder, metrics)
    callbacks: list[Callback] = [guard, metrics]  # the guard comes first, so that a bad step is not logged
    if scored := evaluations or settings.evaluations():
        callbacks.append(BridgeEvaluations(scored, folder, metrics))
    callbacks.append(Checksums())
    if settings.keep_every and config.checkpoint.most_recent_k > -1:
        callbacks.append(Retention(max(1, config.checkpoint.most_recent_k), settings.keep_every))
        config.checkpoint.most_recent_k = -1  # the callback removes checkpoints, and Bridge removes none
    if config.scheduler.override_opt_param_scheduler:
        callbacks.insert(0, NewRates(config))
    if FT_SOCKET in os.environ and not (config.ft and config.ft.enable_ft_package):
        callbacks.append(Heartbeat())
    settings.callbacks = tuple(map(type, callbacks))  # type: ignore[attr-defined]  # see `require_callbacks`
    return callbacks


def _take_statistics(config: ConfigContainer, every: int, folder: Path) -> None:
    """Make Bridge turn on Transformer Engine's FP8 statistics, on a GPU, unless the run sets `tensor_inspect`."""
    require_inspect(every, "config.upcycle.fp8_statistics_every")
    if every and torch.cuda.is_available() and not config.tensor_inspect:
        asked = features(every, mixed_precision_of(config))
        config.tensor_inspect = TensorInspectConfig(enabled=True, features=asked, log_dir=str(folder))


class BridgeLossGuard(Callback):
    """Ends the run on all ranks at a non-finite loss, and at a spike or limit if the settings say so.

    It replaces Bridge's own checks, which end one rank and leave the others waiting.

    Args:
        settings: settings of the run.
        folder: folder of the training.
        metrics: callback whose lines are compared with the limits, after the following step.
    """

    def __init__(self, settings: UpcycleSettings, folder: Path, metrics: BridgeMetrics) -> None:
        self._stops, self._folder, self._metrics = settings.stop_on_spike, folder, metrics
        self._spikes = LossSpikes(settings.spike_window, settings.spike_threshold)
        limits = settings.limits()
        self._watch = LimitWatch(limits, folder) if limits.are_set else None

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Check the step's loss and gradient norm, and the limits of the step before.

        Raises:
            UpcycleError: a number is not finite, the loss is a spike and the settings end the run, or a limit is
                exceeded.
        """
        reason = self._judge(context) or self._above_limits()
        if reason is None:
            return
        config = context.state.cfg
        maybe_finalize_async_save(context.state, config.checkpoint, blocking=True)  # it is older than this step
        model = getattr(config.model, "transformer", config.model)
        rate, aux_loss = config.optimizer.lr, getattr(model, "moe_aux_loss_coeff", None)
        raise stop_error(reason, self._folder, "bridge", rate=rate, aux_loss=aux_loss)

    def _judge(self, context: CallbackContext) -> StopReason | None:
        """Return the reason why this step ends the run, on all ranks."""
        last = torch.distributed.get_world_size() - 1
        logged = loss_on_last_rank(context.loss_dict)
        numbers = torch.tensor(
            [float("nan") if logged is None else float(logged), context.grad_norm or 0.0, logged is not None],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        torch.distributed.broadcast(numbers, last)
        loss, norm, is_known = numbers.tolist()
        step = context.state.train_state.step + 1  # Bridge counts the step after this call
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if is_known and not math.isfinite(value):
                return StopReason(what, value, "a finite number", step, step)
        if not is_known:
            return None
        limit = self._spikes.add(step, loss, self._folder if torch.distributed.get_rank() == 0 else None)
        if limit is None or not self._stops:
            return None
        return StopReason("loss", loss, f"at most {limit:.4f}", step, step)

    def _above_limits(self) -> StopReason | None:
        """Return the reason why a limit ends the run, on all ranks; the first rank knows the numbers."""
        if self._watch is None:
            return None
        line = self._metrics.line
        found = [self._watch.add(line) if line else None]
        torch.distributed.broadcast_object_list(found)
        return found[0]


class Checksums(Callback):
    """Writes the checksums of the files that this rank has written, when a checkpoint is complete."""

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """Hash the files."""
        save_checksums(context.state.cfg.checkpoint.save)


class Retention(Callback):
    """Removes the checkpoints that need not be kept, on the first rank.

    Args:
        keep_last: number of newest checkpoints to keep.
        keep_every: steps between two checkpoints that are kept for good.
    """

    def __init__(self, keep_last: int, keep_every: int) -> None:
        self._keep_last, self._keep_every = keep_last, keep_every

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """Remove the checkpoints after a newer one is complete."""
        if torch.distributed.get_rank() == 0:
            checkpoints = by_step(Path(context.state.cfg.checkpoint.save))
            for path in removable(checkpoints, self._keep_last, kept_for_good(checkpoints, self._keep_every)):
                shutil.rmtree(path)


class Heartbeat(Callback):
    """Tells `ft_launcher` after each step that this rank is alive; see `pipeline.executors.ft.ft_command`.

    The callback keeps working after its watcher has ended. If a scheduler sends SIGTERM to all processes of a job, the
    watcher ends at once, but the ranks must still save.
    """

    def __init__(self) -> None:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient, RankMonitorClientError

        self._client, self._gone = RankMonitorClient(), (RankMonitorClientError, OSError)
        self._client.init_workload_monitoring()

    def on_train_start(self, context: CallbackContext) -> None:
        """Report that the model is built."""
        self._beat()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Report that a step is done."""
        self._beat()

    def on_train_end(self, context: CallbackContext) -> None:
        """Tell the watcher to stop, because the work after the training may take any time."""
        with contextlib.suppress(*self._gone):
            self._client.shutdown_workload_monitoring()

    def _beat(self) -> None:
        with contextlib.suppress(*self._gone):
            self._client.send_heartbeat()
