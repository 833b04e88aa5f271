"""One line of metrics per training step: for people on the console, for the report as JSON lines, for TensorBoard.

Works the same on every layout: each step ends with one small reduction in which all ranks take part (`router_health`),
and only the first rank waits for it.
"""

# No postponed annotations, and Optional: NeMo-Run parses `trainer.callbacks[0].gpu=h100` by them.

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from nemo.utils.app_state import AppState

from nemo_upcycle.data.blend_module import describe_data
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.monitoring.router_health import RouterHealth, shares, sum_over_ranks
from nemo_upcycle.monitoring.throughput import Throughput, memory_gib, peaks_of
from nemo_upcycle.utils.files import whole_file, write_json
from nemo_upcycle.utils.nested import flat
from nemo_upcycle.utils.progress import duration, show_messages


class MetricsLogger(Callback):
    """Logs every step, on the first rank: `metrics.jsonl` beside the run's logs, a line with an ETA on the console.

    `training.json` beside it says what the run is trained with. A validation has a line with `step` and
    `validation_loss`; with `trainer.num_sanity_val_steps` there is one of step 0, before training.

    A step's line holds `step`, `loss`, `grad_norm`, `lr`, `tokens`, `seconds`; the rates of `Throughput.of`;
    `memory_gib` (the most that any rank has held) and `memory_share` of its card; and, of an MoE model,
    `expert_load` ([L][E], each expert's share of its layer's token slots) and `router` (`RouterHealth.describe`, one
    number a layer). The same numbers go to the trainer's own loggers, TensorBoard for one: of layers their mean at
    every step, and each of them every `trainer.log_every_n_steps` steps.

    Args:
        filename: name of the file, inside the run's log folder.
        gpu: the card that MFU is stated for, as in `peaks_of`; None asks the driver, and states none without it.
        expert_distance_every: steps between two looks at the experts' weights; the first and the last step have one.

    Example:
        >>> recipe.trainer.callbacks.append(run.Config(MetricsLogger, gpu="h100"))  # doctest: +SKIP
    """

    def __init__(
        self,
        filename: str = "metrics.jsonl",
        gpu: Optional[str] = None,  # noqa: UP045
        expert_distance_every: int = 100,
    ) -> None:
        self.filename = filename
        self.gpu = gpu
        self.expert_distance_every = expert_distance_every
        self._health: RouterHealth | None = None
        self._throughput: Throughput | None = None
        self._start_s = self._last_s = 0.0
        self._first_step = 0
        self._loss_before: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the routers and start the clock."""
        config: Any = pl_module.config
        if config.num_moe_experts:
            self._health = RouterHealth(list(trainer.strategy.megatron_parallel), config)  # type: ignore[attr-defined]
        if torch.distributed.get_rank() == 0:
            _move_logs_only()
            _keep_until(self._path(), trainer.global_step or -1)
            self._throughput = self._rates(trainer, pl_module)
            settings = _settings(trainer, pl_module) | {"flops_per_token": self._throughput.flops_per_token()}
            settings["card"] = self._card()
            write_json(self._path().with_name("training.json"), settings)
            if self._loss_before is not None and trainer.global_step == 0:
                self._append_validation(trainer, self._loss_before)
            show_messages().info("%s", self._throughput.describe())
            show_messages().info("training data: %s", settings["data"])
        self._start_s = self._last_s = time.monotonic()
        self._first_step = trainer.global_step

    def _rates(self, trainer: Any, pl_module: Any) -> Throughput:
        config = pl_module.config
        architecture = architecture_of(config, config.vocab_size or pl_module.tokenizer.vocab_size)
        sequence = trainer.datamodule.data_sampler.seq_len
        return Throughput(architecture, sequence, torch.distributed.get_world_size(), peaks_of(self._card()))

    def _card(self) -> str:
        return self.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else "")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step's line."""
        step = trainer.global_step
        due = step in (1, trainer.max_steps) or step % self.expert_distance_every == 0
        parts = self._health.local(with_experts=due) if self._health else {}
        summed = sum_over_ranks(parts | {"memory": _own_memory()})
        if summed is None:
            return
        assert self._throughput is not None
        now_s = time.monotonic()
        sampler = pl_module.trainer.datamodule.data_sampler  # type: ignore[attr-defined]
        held, card = max(summed["memory"].tolist())  # of the rank that has held the most
        step_tokens = sampler.global_batch_size * sampler.seq_len
        line: dict[str, Any] = {
            "step": step,
            "loss": _number(trainer.callback_metrics.get("reduced_train_loss")),
            "grad_norm": _number(trainer.callback_metrics.get("grad_norm")),
            "lr": _number(trainer.callback_metrics.get("lr"), 12),
            "tokens": step * step_tokens,
            "seconds": round(now_s - self._last_s, 3),
            **self._throughput.of(step_tokens, now_s - self._last_s),
            "memory_gib": round(held, 3),
            **({"memory_share": round(held / card, 4)} if card else {}),
        }
        self._last_s = now_s
        self._say(line, trainer.max_steps, now_s)
        if self._health:
            line["expert_load"] = [[round(share, 5) for share in row] for row in shares(summed["counts"]).tolist()]
            line["router"] = self._health.describe(summed)
        self._append(line)
        self._log(trainer, line)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the validation loss; Lightning's sanity check, which comes before `on_train_start`, gives step 0."""
        loss = _number(trainer.callback_metrics.get("val_loss"))
        if trainer.sanity_checking:
            self._loss_before = loss
        elif torch.distributed.get_rank() == 0 and loss is not None:
            self._append_validation(trainer, loss)
        self._last_s = time.monotonic()

    def restart_clock(self) -> None:
        """Leave out of the next step's time what another callback has done since the last one."""
        self._last_s = time.monotonic()

    def _append_validation(self, trainer: pl.Trainer, loss: float) -> None:
        self._append({"step": trainer.global_step, "validation_loss": loss})
        show_messages().info("step %d/%d  validation loss %.4f", trainer.global_step, trainer.max_steps, loss)

    def _path(self) -> Path:
        return Path(AppState().log_dir) / self.filename

    def _append(self, line: dict[str, Any]) -> None:
        with self._path().open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def _log(self, trainer: pl.Trainer, line: dict[str, Any]) -> None:
        """Pass the line to TensorBoard and other loggers, without what NeMo logs there itself."""
        rates = {name: line[name] for name in line if name.startswith(("tokens_per_s", "tflops", "mfu", "memory"))}
        scalars = dict(flat(rates, "/"))
        every_layer = line["step"] % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        for name, values in line.get("router", {}).items():
            layers = {layer: value for layer, value in enumerate(values) if value is not None}
            scalars[f"router/{name}"] = sum(layers.values()) / len(layers)
            if every_layer:
                scalars |= {f"router_layers/{name}/{layer:03d}": value for layer, value in layers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=line["step"])

    def _say(self, line: dict[str, Any], max_steps: int, now_s: float) -> None:
        done = line["step"] - self._first_step
        left_s = (now_s - self._start_s) / max(done, 1) * (max_steps - line["step"])
        mfu = line.get("mfu", {}).get("bf16")
        show_messages().info(
            "step %d/%d  loss %s  grad norm %s  lr %s  %.0f tokens/s%s  ETA %s",
            line["step"],
            max_steps,
            _short(line["loss"], ".4f"),
            _short(line["grad_norm"], ".3f"),
            _short(line["lr"], ".2e"),
            line["tokens_per_s"],
            f"  MFU {100 * mfu['full']:.1f} % of BF16 (full attention)" if mfu else "",
            duration(left_s),
        )


def _settings(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Return what a run is trained on and with, as it acts: data, batch, sequence length, precision, learning rate."""
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
    factors = getattr(optim, "factors", None)  # of `UpcycleOptimizer`
    return settings | ({"lr_factors": asdict(factors)} if factors else {})


def _own_memory() -> torch.Tensor:
    """Return GiB held and GiB of the card in this rank's row of [ranks, 2]; in a sum each rank has its own."""
    memory = torch.zeros(torch.distributed.get_world_size(), 2, dtype=torch.float64)
    held, card = memory_gib()
    memory[torch.distributed.get_rank()] = torch.tensor([held, card or 0.0])
    return memory


def _move_logs_only() -> None:
    """Let NeMo's checkpoint callback, which comes after this one, move only logs of earlier runs into `run_0`.

    Otherwise it moves every file of the log folder: metrics, receipt and the files by which a stage is known.
    """
    state = AppState()
    state.files_to_move = [file for file in state.files_to_move or [] if Path(file).suffix in (".log", ".txt")]


def _keep_until(path: Path, step: int) -> None:
    """Delete the lines of steps that a resumed run will repeat."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with whole_file(path) as aside:
            aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for a line that a full disk cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _number(value: Any, digits: int = 6) -> float | None:
    return None if value is None else round(float(value), digits)


def _short(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
