"""The callbacks of a training in Bridge: its metrics, and the features of `config.upcycle`."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.checkpointing import maybe_finalize_async_save
from megatron.bridge.training.config import (
    ConfigContainer,
    OptimizerConfigOverrideProvider,
    OptimizerConfigOverrideProviderContext,
    TensorInspectConfig,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.monitoring.fp8_statistics import features, require_inspect
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.trainers.base import FT_SOCKET, Evaluations
from nemo_upcycle.trainers.bridge.metrics import BridgeEvaluations, BridgeMetrics, loss_on_last_rank
from nemo_upcycle.trainers.bridge.settings import UpcycleSettings, mixed_precision_of, settings_of
from nemo_upcycle.trainers.loss_spikes import LossSpikes
from nemo_upcycle.trainers.schedules import (
    EXPERTS,
    MARKS,
    ROUTER,
    Anneal,
    LearningRateFactors,
    annealed_configs,
    describe,
    part_of,
    scale_within_step,
)
from nemo_upcycle.utils.progress import show_messages


def upcycle_callbacks(config: ConfigContainer, folder: Path, evaluations: Evaluations | None = None) -> list[Callback]:
    """Return the callbacks of a run, and complete its configuration for them; on every rank, before `pretrain`.

    Args:
        config: the run; changed in place where learning rates differ by part.
        folder: for `metrics.jsonl`, `training.json` and what is evaluated.
        evaluations: what is scored on the way; None: what `config.upcycle` says.

    Raises:
        SpecError: a setting is out of range, or contradicts another one.

    Example:
        >>> pretrain(config, forward_step, callbacks=upcycle_callbacks(config, folder))  # doctest: +SKIP
    """
    settings = settings_of(config)
    settings.check()
    factors, anneal = settings.schedules()
    if not factors.is_neutral:
        _set_groups(config)
    _take_statistics(config, settings.fp8_statistics_every, folder)
    metrics = BridgeMetrics(folder)
    callbacks: list[Callback] = [BridgeLossGuard(settings, folder), metrics]  # a broken step is not written
    if scored := evaluations or settings.evaluations():
        callbacks.append(BridgeEvaluations(scored, folder, metrics))
    if not factors.is_neutral or anneal.steps:
        callbacks.append(BridgeSchedules(factors, anneal))
    if FT_SOCKET in os.environ and not (config.ft and config.ft.enable_ft_package):
        callbacks.append(Heartbeat())
    settings.callbacks = tuple(map(type, callbacks))  # type: ignore[attr-defined]  # see `require_callbacks`
    return callbacks


def _take_statistics(config: ConfigContainer, every: int, folder: Path) -> None:
    """Let Bridge turn on Transformer Engine's statistics about FP8, on a GPU; a run's own `tensor_inspect` stays."""
    require_inspect(every, "config.upcycle.fp8_statistics_every")
    if every and torch.cuda.is_available() and not config.tensor_inspect:
        asked = features(every, mixed_precision_of(config))
        config.tensor_inspect = TensorInspectConfig(enabled=True, features=asked, log_dir=str(folder))


@dataclass
class GroupsByPart(OptimizerConfigOverrideProvider):
    """Puts router, experts and the rest into parameter groups of their own, marked in `lr_mult`.

    A run has to start with it to resume with it: other groups cannot take over a checkpoint's.
    """

    def build_config_overrides(self, context: OptimizerConfigOverrideProviderContext) -> dict[ParamKey, Any]:
        """Return Bridge's own overrides, and the marks."""
        marked = {_key_of(part): {"lr_mult": MARKS[part]} for part in (ROUTER, EXPERTS)}
        return {**(super().build_config_overrides(context) or {}), **marked}


def _key_of(part: str) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(part, lambda _, name: part_of(name) == part))


def _set_groups(config: ConfigContainer) -> None:
    provider = config.optimizer_config_override_provider
    if type(provider) not in (OptimizerConfigOverrideProvider, GroupsByPart):
        raise SpecError(
            "config.optimizer_config_override_provider",
            got=type(provider).__name__,
            expected="Bridge's own: learning rates by part have groups of their own",
            fix="derive yours from nemo_upcycle.trainers.bridge.callbacks.GroupsByPart, or omit one of both",
        )
    if config.optimizer.optimizer_cuda_graph:
        expected = "False: a graph keeps learning rates"
        raise SpecError("config.optimizer.optimizer_cuda_graph", got=True, expected=expected, fix="set it to False")
    config.optimizer_config_override_provider = GroupsByPart()


class BridgeSchedules(Callback):
    """Scales the learning rates of router and experts, and anneals the load-balancing coefficient.

    Args:
        factors: factors on the learning rates.
        anneal: anneal of the coefficient, which starts at the model's.
    """

    def __init__(self, factors: LearningRateFactors, anneal: Anneal) -> None:
        self._factors, self._anneal = factors, anneal
        self._router_configs: list[Any] = []

    def on_train_start(self, context: CallbackContext) -> None:
        """Reach into the optimizer's step and the routers' configurations."""
        state, model = context.state, context.state.cfg.model
        if not self._factors.is_neutral:  # the number of finished steps goes up after the optimizer's step
            scale_within_step(
                context.optimizer, "lr_mult", lambda part: self._factors.of(part, state.train_state.step)
            )
        if self._anneal.steps:
            transformer = getattr(model, "transformer", model)
            self._router_configs = annealed_configs(transformer, context.model, "upcycle.aux_loss_steps")
            self._anneal = replace(self._anneal, start=transformer.moe_aux_loss_coeff)
        if torch.distributed.get_rank() == 0:
            for line in describe(self._factors, self._anneal):
                show_messages().info("%s", line)

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Set the step's load-balancing coefficient."""
        self._set(self._anneal.at(context.state.train_state.step))

    def on_train_end(self, context: CallbackContext) -> None:
        """Restore the model's configuration."""
        self._set(self._anneal.start)

    def _set(self, coefficient: float) -> None:
        for config in self._router_configs:
            config.moe_aux_loss_coeff = coefficient


class BridgeLossGuard(Callback):
    """Reports spikes of the loss, and ends the run at one if the settings say so, on all ranks.

    A loss that is not a number ends a run by Bridge's own check.

    Args:
        settings: settings of the run.
        folder: folder of the training.
    """

    def __init__(self, settings: UpcycleSettings, folder: Path) -> None:
        self._stops, self._folder = settings.stop_on_spike, folder
        self._spikes = LossSpikes(settings.spike_window, settings.spike_threshold)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Look at the step's loss.

        Raises:
            UpcycleError: it is a spike, and the run shall end.
        """
        last = torch.distributed.get_world_size() - 1
        logged = loss_on_last_rank(context.loss_dict)
        loss = torch.tensor(math.nan if logged is None else float(logged), device=torch.cuda.current_device())
        torch.distributed.broadcast(loss, last)
        value, step = loss.item(), context.state.train_state.step + 1  # it counts the step after this
        if not math.isfinite(value):
            return
        limit = self._spikes.add(step, value, self._folder if torch.distributed.get_rank() == 0 else None)
        if limit is None or not self._stops:
            return
        checkpoint = context.state.cfg.checkpoint
        maybe_finalize_async_save(context.state, checkpoint, blocking=True)  # one in writing is a good one
        kept = newest_checkpoint(Path(checkpoint.save))
        raise UpcycleError(
            f"loss of step {step}",
            got=value,
            expected=f"at most {limit:.4f}; the last good checkpoint is {kept or 'the dense one'}",
            fix="start again to go on from there; if it happens at the same step again, lower optimizer.lr or look at "
            "that step's data",
        )


class Heartbeat(Callback):
    """Tells `ft_launcher` after each step that this rank is alive; see `pipeline.executors.ft.ft_command`.

    It goes on without its watcher, which ends at once when a scheduler sends SIGTERM to all processes of a job: the
    ranks have to save first.
    """

    def __init__(self) -> None:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient, RankMonitorClientError

        self._client, self._gone = RankMonitorClient(), (RankMonitorClientError, OSError)
        self._client.init_workload_monitoring()

    def on_train_start(self, context: CallbackContext) -> None:
        """Say that the model is built."""
        self._beat()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Say that a step is done."""
        self._beat()

    def on_train_end(self, context: CallbackContext) -> None:
        """Ask for no more watching: what follows takes as long as it takes."""
        with contextlib.suppress(*self._gone):
            self._client.shutdown_workload_monitoring()

    def _beat(self) -> None:
        with contextlib.suppress(*self._gone):
            self._client.send_heartbeat()
