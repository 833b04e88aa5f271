"""One line of metrics per training step: on the console, as JSON lines for the report, and in TensorBoard."""

# Do not postpone annotations here, and use Optional: NeMo-Run needs them to parse `trainer.callbacks[0].gpu=h100`.

from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from nemo.utils.app_state import AppState

from nemo_upcycle.data.blend_module import describe_data
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.trainers.aux_loss import describe_balancing
from nemo_upcycle.trainers.monitoring.fp8_statistics import (
    count_step,
    name_layers,
    require_inspect,
    start_inspect,
    watch_fp8,
)
from nemo_upcycle.trainers.monitoring.router_health import RouterHealth
from nemo_upcycle.trainers.monitoring.step_metrics import StepFacts, StepMetrics
from nemo_upcycle.trainers.nemo.lora import UpcycleLoRA
from nemo_upcycle.utils.nested import flat


class MetricsLogger(Callback):
    """Logs every step on the first rank: in `metrics.jsonl` beside the run's logs, and as a console line with an ETA.

    `training.json` beside `metrics.jsonl` lists the settings of the training. If `trainer.num_sanity_val_steps` is
    set, the model is validated at step 0, before training. `StepMetrics` describes the lines. The trainer's own
    loggers, such as TensorBoard, get the same numbers: the mean over the layers at every step, and each layer's value
    every `trainer.log_every_n_steps` steps.

    Args:
        filename: name of the file, inside the run's log folder.
        gpu: GPU that MFU is computed for, named as in `peaks_of`; None: the driver's GPU, and no MFU without a driver.
        expert_distance_every: steps between two measurements of the distance between the experts' weights; the first
            and the last step are always measured.
        fp8_statistics_every: steps between two FP8 statistics of Transformer Engine, only on GPUs; 0: none.

    Example:
        >>> recipe.trainer.callbacks.append(run.Config(MetricsLogger, gpu="h100"))  # doctest: +SKIP
    """

    def __init__(
        self,
        filename: str = "metrics.jsonl",
        gpu: Optional[str] = None,  # noqa: UP045
        expert_distance_every: int = 100,
        fp8_statistics_every: int = 0,
    ) -> None:
        self.filename = filename
        self.gpu = gpu
        self.expert_distance_every = expert_distance_every
        self.fp8_statistics_every = fp8_statistics_every
        #: Line of the last step, on the first rank.
        self.line: dict[str, Any] | None = None
        self._metrics: StepMetrics | None = None
        self._loss_before: Any = None

    @property
    def _inspects(self) -> bool:
        return bool(self.fp8_statistics_every) and torch.cuda.is_available()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Turn on Transformer Engine's statistics before the model is built."""
        require_inspect(self.fp8_statistics_every, "fp8_statistics_every")
        if self._inspects:
            precision = getattr(trainer.precision_plugin, "dtype_config", None)
            start_inspect(self.fp8_statistics_every, precision, Path(AppState().log_dir))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the routers and start the clock."""
        module: Any = pl_module
        config = module.config
        health = None
        if config.num_moe_experts:
            health = RouterHealth(list(trainer.strategy.megatron_parallel), config)  # type: ignore[attr-defined]
        if torch.distributed.get_rank() == 0:
            _move_logs_only()
        sampler = trainer.datamodule.data_sampler  # type: ignore[attr-defined]
        training = StepFacts(
            Path(AppState().log_dir) / self.filename,
            architecture_of(config, config.vocab_size or module.tokenizer.vocab_size),
            sampler.seq_len,
            sampler.global_batch_size,
            trainer.max_steps,
            self.gpu,
            self.expert_distance_every,
        )
        settings = _settings(trainer, pl_module)
        if self._inspects:
            name_layers(list(trainer.strategy.megatron_parallel), trainer.global_step)  # type: ignore[attr-defined]
        self._metrics = StepMetrics(training, health, trainer.global_step, settings, watch_fp8(config))
        if trainer.num_sanity_val_steps and trainer.global_step == 0:
            self._metrics.validation(0, self._loss_before)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step's line."""
        assert self._metrics is not None
        found = trainer.callback_metrics
        loss = _from_first_rank(found.get("reduced_train_loss"))
        self.line = self._metrics.step(trainer.global_step, loss, found.get("grad_norm"), found.get("lr"))
        if self.line is not None:
            self._log(trainer, self.line)
        if self._inspects:
            count_step()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the validation loss; Lightning's sanity check, before `on_train_start`, gives the loss of step 0."""
        loss = _from_first_rank(trainer.callback_metrics.get("val_loss"))
        if trainer.sanity_checking:
            self._loss_before = loss
        elif self._metrics is not None:
            self._metrics.validation(trainer.global_step, loss)

    def restart_clock(self) -> None:
        """Exclude the time that another callback took since the last step from the next step's time."""
        if self._metrics is not None:
            self._metrics.restart_clock()

    def _log(self, trainer: pl.Trainer, line: dict[str, Any]) -> None:
        """Pass the line's numbers to TensorBoard and other loggers, except the numbers that NeMo logs there itself."""
        rates = {
            name: line[name] for name in line if name.startswith(("tokens_per_s", "tflops", "mfu", "memory", "fp8"))
        }
        scalars = dict(flat(rates, "/"))
        every_layer = line["step"] % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        for name, values in line.get("router", {}).items():
            layers = {layer: value for layer, value in enumerate(values) if value is not None}
            scalars[f"router/{name}"] = sum(layers.values()) / len(layers)
            if every_layer:
                scalars |= {f"router_layers/{name}/{layer:03d}": value for layer, value in layers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=line["step"])


def _from_first_rank(loss: Any) -> Any:
    """Return the loss on the first rank and None on the others, because all ranks have the same loss."""
    return loss if torch.distributed.get_rank() == 0 else None


def _settings(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Describe the settings that a run trains with: data, batch, sequence length, precision, learning rate."""
    sampler, optim = trainer.datamodule.data_sampler, pl_module.optim
    scheduler = optim.lr_scheduler
    schedule = {"name": type(scheduler).__name__.removesuffix("Scheduler") if scheduler else "constant"}
    parts = ("warmup_steps", "constant_steps", "min_lr")
    settings: dict[str, Any] = {
        "data": describe_data(trainer.datamodule),
        "max_steps": trainer.max_steps,
        "ranks": torch.distributed.get_world_size(),
        "micro_batch_size": sampler.micro_batch_size,
        "global_batch_size": sampler.global_batch_size,
        "seq_length": sampler.seq_len,
        "precision": str(trainer.precision_plugin.precision) + (" with FP8" if pl_module.config.fp8 else ""),
        "optimizer": optim.config.optimizer,
        "weight_decay": optim.config.weight_decay,
        "max_lr": optim.config.lr,
        "schedule": schedule | {name: getattr(scheduler, name) for name in parts if hasattr(scheduler, name)},
    }
    settings |= describe_balancing(pl_module.config)
    adapters = next((one for one in trainer.callbacks if isinstance(one, UpcycleLoRA)), None)
    settings |= {"lora": {"rank": adapters.dim, "alpha": adapters.alpha}} if adapters else {}
    return settings


def _move_logs_only() -> None:
    """Let NeMo's checkpoint callback, which runs after `MetricsLogger`, move only logs of earlier runs into `run_0`.

    Otherwise NeMo's callback moves every file of the log folder: the metrics, the receipt, and the files that identify
    a stage.
    """
    state = AppState()
    state.files_to_move = [file for file in state.files_to_move or [] if Path(file).suffix in (".log", ".txt")]
