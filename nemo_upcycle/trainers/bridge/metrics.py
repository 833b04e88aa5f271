"""Write the metrics of a Megatron-Bridge run to the same files and in the same format as for a NeMo run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer

from nemo_upcycle.data.blend_samples import describe_blend
from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.models.hybrid import hybrid_of
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.trainers.aux_loss import describe_balancing
from nemo_upcycle.trainers.bridge.blend import BlendDataset
from nemo_upcycle.trainers.bridge.chat import ChatDataset
from nemo_upcycle.trainers.bridge.settings import mixed_precision_of
from nemo_upcycle.trainers.facts import Evaluations
from nemo_upcycle.trainers.live_evaluation import LiveEvaluation
from nemo_upcycle.trainers.monitoring.fp8_statistics import watch_fp8
from nemo_upcycle.trainers.monitoring.router_health import RouterHealth
from nemo_upcycle.trainers.monitoring.step_metrics import StepFacts, StepMetrics
from nemo_upcycle.utils.progress import show_messages


class BridgeMetrics(Callback):
    """Writes `metrics.jsonl` and `training.json`, and prints a line with an ETA on the console; see `StepMetrics`.

    Bridge's own loggers stay as they are.

    Args:
        folder: folder for the two files.

    Example:
        >>> pretrain(config, forward_step, callbacks=[BridgeMetrics(Path("runs/mine"))])  # doctest: +SKIP
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Line of the last step, on the first rank.
        self.line: dict[str, Any] | None = None
        self._metrics: StepMetrics | None = None
        self._lr: Any = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Watch the routers and start the clock."""
        config = context.state.cfg
        model = config.model
        transformer = getattr(model, "transformer", model)
        health = None
        if transformer.num_moe_experts:  # Bridge logs Megatron's auxiliary losses later, and clears them then
            logs = not config.logger.skip_train_metrics_log
            hybrid = hybrid_of(model)
            layers = hybrid.networks if hybrid else None
            health = RouterHealth(context.model, transformer, clears_losses=not logs, layers=layers)
        facts = StepFacts(
            self.folder / "metrics.jsonl",
            architecture_of(_flat(model), model.vocab_size),
            config.dataset.seq_length,
            config.train.global_batch_size,
            config.train.train_iters,
        )
        step = context.state.train_state.step
        self._metrics = StepMetrics(facts, health, step, _settings(config), watch_fp8(transformer))

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Note the step's learning rate, because after the step the optimizer has the next step's rate."""
        assert context.optimizer is not None
        self._lr = context.optimizer.param_groups[0]["lr"]

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Write the step's line."""
        assert self._metrics is not None
        step = context.state.train_state.step + 1  # Bridge counts the step after this call
        loss = loss_on_last_rank(context.loss_dict)
        self.line = self._metrics.step(step, loss, context.grad_norm, self._lr)

    def restart_clock(self) -> None:
        """Exclude the time that another callback took since the last step from the next step's time."""
        if self._metrics is not None:
            self._metrics.restart_clock()

    def on_eval_end(self, context: CallbackContext) -> None:
        """Write the validation loss."""
        if self._metrics is not None:
            self._metrics.validation(context.state.train_state.step, loss_on_last_rank(context.total_loss_dict))


class BridgeEvaluations(Callback):
    """Evaluates the model every few steps with a small suite; see `LiveEvaluation`.

    Args:
        evaluations: settings of the evaluations.
        folder: folder of the training.
        metrics: callback whose clock excludes the evaluations; it comes before this callback in the list.
    """

    def __init__(self, evaluations: Evaluations, folder: Path, metrics: BridgeMetrics) -> None:
        self._evaluations, self._folder, self._metrics = evaluations, folder, metrics
        self._live: LiveEvaluation | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Build the suite, and evaluate the model that the training starts from."""
        config = context.state.cfg
        data = config.dataset
        if not isinstance(data, BlendDataset):
            show_messages().info("no evaluation while training: %s holds out no texts", type(data).__name__)
            return
        self._live = LiveEvaluation(
            self._evaluations,
            self._folder,
            open_blend(data.folder),
            config.train.train_iters,
            self._metrics.restart_clock,
        )
        step = context.state.train_state.step
        self._live.start(context.model, config.model.vocab_size, data.seq_length, step)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Evaluate after every few steps and after the last step."""
        if self._live is not None:
            self._live.after(context.state.train_state.step + 1)  # Bridge counts the step after this call


def _flat(model: Any) -> Any:
    """Return all fields of a model's configuration in one object; a builder's configuration has two parts."""
    transformer = getattr(model, "transformer", None)
    return SimpleNamespace(**(vars(model) | vars(transformer))) if transformer else model


def loss_on_last_rank(losses: dict[str, torch.Tensor] | None) -> torch.Tensor | None:
    """Return a step's loss on the last rank, which is in the last pipeline stage; None on all other ranks."""
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    return losses.get("lm loss") if losses and is_last else None


def _data_of(config: ConfigContainer) -> str:
    """Describe the data of a run in a few words, for its report."""
    data = config.dataset
    if isinstance(data, BlendDataset):
        return describe_blend(open_blend(data.folder))
    return data.chat.card if isinstance(data, ChatDataset) else type(data).__name__


def _settings(config: ConfigContainer) -> dict[str, Any]:
    """Describe the settings of a run for `training.json`: data, batch, sequence length, precision, learning rate."""
    data, scheduler, optimizer = config.dataset, config.scheduler, config.optimizer
    precision = mixed_precision_of(config)
    name = "bf16" if precision and precision.bf16 else "fp16" if precision and precision.fp16 else "32"
    return {
        "data": _data_of(config),
        "max_steps": config.train.train_iters,
        "ranks": torch.distributed.get_world_size(),
        "micro_batch_size": config.train.micro_batch_size,
        "global_batch_size": config.train.global_batch_size,
        "seq_length": data.seq_length,
        "precision": name + (" with FP8" if precision and precision.fp8 else ""),
        "optimizer": optimizer.optimizer,
        "weight_decay": optimizer.weight_decay,
        "max_lr": optimizer.lr,
        "schedule": {
            "name": scheduler.lr_decay_style,
            "warmup_steps": scheduler.lr_warmup_iters,
            "min_lr": optimizer.min_lr,
        },
        **describe_balancing(getattr(config.model, "transformer", config.model)),
    }
