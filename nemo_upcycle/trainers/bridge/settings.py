"""The settings that this package adds to a Bridge training, as `config.upcycle`. Their defaults change nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron.bridge.training.config import MockGPTDatasetConfig
from megatron.bridge.training.mixed_precision import get_mixed_precision_config

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.facts import Evaluations
from nemo_upcycle.trainers.paper import high_rate
from nemo_upcycle.trainers.stop_limits import StopLimits
from nemo_upcycle.utils.validation import check_number, check_whole


@dataclass(kw_only=True)
class UpcycleSettings:
    """Settings of a training of an upcycled model that act through `upcycle_callbacks`.

    Args:
        spike_window: number of previous losses that a loss is compared with; see `LossSpikes`.
        spike_threshold: a loss is a spike if it is more than this number of spreads above the median of these losses.
        stop_on_spike: whether a spike ends the run; otherwise it is a warning and a line in `metrics.jsonl`.
        min_expert_load: see `StopLimits`.
        max_dropped: see `StopLimits`.
        max_above_parent: see `StopLimits`.
        limit_steps: see `StopLimits`.
        keep_every: steps between two checkpoints that are kept for good, besides the newest
            `checkpoint.most_recent_k`; see `kept_for_good`. 0: none.
        evaluate_every: steps between two evaluations of the live model; 0: no evaluations.
        evaluate_suite: suite of these evaluations: a name in `conf/evaluation`, a YAML file, or the folder of a suite.
        evaluate_limit: number of items to take from the start of each task; None: all.
        fp8_statistics_every: steps between two FP8 statistics of Transformer Engine, only on GPUs; 0: off.

    Example:
        >>> config.upcycle.stop_on_spike = True  # doctest: +SKIP
    """

    spike_window: int = 128
    spike_threshold: float = 8.0
    stop_on_spike: bool = False
    min_expert_load: float | None = None
    max_dropped: float | None = None
    max_above_parent: float | None = None
    limit_steps: int = 100
    keep_every: int = 0
    evaluate_every: int = 0
    evaluate_suite: str = "watch"
    evaluate_limit: int | None = None
    fp8_statistics_every: int = 0

    def evaluations(self) -> Evaluations | None:
        """Return the settings of the evaluations during training; None if nothing is evaluated."""
        if not self.evaluate_every:
            return None
        return Evaluations(suite=self.evaluate_suite, every_n_steps=self.evaluate_every, limit=self.evaluate_limit)

    def limits(self) -> StopLimits:
        """Return the limits that end the training."""
        return StopLimits(self.min_expert_load, self.max_dropped, self.max_above_parent, self.limit_steps)

    def check(self) -> None:
        """Check the values.

        Raises:
            SpecError: a value is out of range or unknown.
        """
        check_whole("spike_window", self.spike_window, 1)
        check_number("spike_threshold", self.spike_threshold, 0.0)
        self.limits().check()
        check_whole("keep_every", self.keep_every, 0)
        check_whole("evaluate_every", self.evaluate_every, 0)
        check_whole("fp8_statistics_every", self.fp8_statistics_every, 0)
        if self.evaluate_limit is not None:
            check_whole("evaluate_limit", self.evaluate_limit, 1)


def __getattr__(name: str) -> Any:
    """Return a class that this module had in release 0.3, for reading `run_config.yaml` of an old checkpoint."""
    if name != "UpcyclingConfig":
        raise AttributeError(name)
    from nemo_upcycle.trainers.bridge.node import UpcyclingConfig

    return UpcyclingConfig


def settings_of(config: Any) -> UpcycleSettings:
    """Return the settings of a configuration; for a configuration of Bridge's own class, return the defaults."""
    return getattr(config, "upcycle", None) or UpcycleSettings()


def mixed_precision_of(config: Any) -> Any:
    """Return Bridge's precision settings of a configuration; None if there are none."""
    return get_mixed_precision_config(config.mixed_precision) if config.mixed_precision else None


def require_callbacks(config: Any) -> None:
    """Check that a run with settings has the callbacks that carry them out. Without them, `keep_every` does nothing.

    Raises:
        SpecError: the run has settings but no `upcycle_callbacks`.
    """
    settings = settings_of(config)
    if replace(settings, keep_every=0) != UpcycleSettings() and not hasattr(settings, "callbacks"):
        raise SpecError(
            "config.upcycle",
            kind="refused",
            got="has settings, and the run has none of the callbacks that read them",
            fix="call pretrain(config, forward_step, callbacks=upcycle_callbacks(config, folder))",
        )


def describe(config: Any) -> list[str]:
    """Describe a run at its start: its schedule, and likely mistakes such as mock data or a high learning rate.

    Args:
        config: configuration of the run, completed by Bridge.
    """
    train, rate, lowest = config.train, config.optimizer.lr, config.optimizer.min_lr
    said = [
        f"{train.train_iters} steps of {train.global_batch_size} sequences of {config.model.seq_length} tokens; "
        f"learning rate {rate} to {lowest}, {config.scheduler.lr_decay_style}, {config.scheduler.lr_warmup_iters} "
        "steps of warm-up"
    ]
    if getattr(config.dataset, "mock", False) and not isinstance(config.dataset, MockGPTDatasetConfig):
        said.append("the data are Bridge's mock data: set config.dataset to train on texts")
    return [*said, *filter(None, [high_rate(rate)])]
