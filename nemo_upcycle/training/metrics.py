"""One line of metrics per training step, for people on the console and for the report as JSON lines.

Works the same on every layout: each step ends with one small all-reduce in which all ranks take part.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from nemo.utils.app_state import AppState

from nemo_upcycle.progress import duration, show_messages


class ExpertLoad:
    """Counts, for every MoE layer of the whole model, how many token slots each expert was given.

    Args:
        chunks: this rank's Megatron chunks.
        num_layers: layers of the whole model.
        num_experts: E.
    """

    def __init__(self, chunks: list[torch.nn.Module], num_layers: int, num_experts: int) -> None:
        self._counts_LE: torch.Tensor = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if re.fullmatch(r"(module\.)*decoder\.layers\.\d+\.mlp\.router", name):
                    module.register_forward_hook(self._counter(module.layer_number - 1))

    def _counter(self, layer: int) -> Any:
        def count(module: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            if module.training:
                routing_map_TE = outputs[1]
                self._counts_LE = self._counts_LE.to(routing_map_TE.device)
                self._counts_LE[layer] += routing_map_TE.sum(dim=0)

        return count

    def take(self) -> list[list[float]]:
        """Return every expert's share of the token slots since the last call, [L][E], summed over all ranks."""
        counts_LE = self._counts_LE.clone()
        self._counts_LE.zero_()
        torch.distributed.all_reduce(counts_LE)
        shares_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
        return [[round(share, 5) for share in row] for row in shares_LE.tolist()]


class MetricsLogger(Callback):
    """Writes `metrics.jsonl` beside the run's logs and a line with an ETA to the console, on the first rank.

    Args:
        filename: name of the file, inside the run's log folder.
    """

    def __init__(self, filename: str = "metrics.jsonl") -> None:
        self.filename = filename
        self._load: ExpertLoad | None = None
        self._start_s = self._last_s = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the routers and start the clock."""
        chunks = _megatron(trainer.strategy)
        config: Any = pl_module.config
        if config.num_moe_experts:
            self._load = ExpertLoad(chunks, config.num_layers, config.num_moe_experts)
        self._start_s = self._last_s = time.monotonic()
        self._first_step = trainer.global_step
        if torch.distributed.get_rank() == 0:
            _move_logs_only()
            _keep_until(self._path(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step's line."""
        load = self._load.take() if self._load else None
        if torch.distributed.get_rank() != 0:
            return
        now_s = time.monotonic()
        sampler = pl_module.trainer.datamodule.data_sampler  # type: ignore[attr-defined]
        step_tokens = sampler.global_batch_size * sampler.seq_len
        line: dict[str, Any] = {
            "step": trainer.global_step,
            "loss": _number(trainer.callback_metrics.get("reduced_train_loss")),
            "grad_norm": _number(trainer.callback_metrics.get("grad_norm")),
            "lr": _number(trainer.callback_metrics.get("lr")),
            "tokens": trainer.global_step * step_tokens,
            "seconds": round(now_s - self._last_s, 3),
            "tokens_per_s": round(step_tokens / max(now_s - self._last_s, 1e-9), 1),
        }
        self._last_s = now_s
        self._say(line, trainer.max_steps, now_s)
        self._append(line | ({"expert_load": load} if load else {}))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the validation loss."""
        loss = _number(trainer.callback_metrics.get("val_loss"))
        if torch.distributed.get_rank() == 0 and not trainer.sanity_checking and loss is not None:
            self._append({"step": trainer.global_step, "validation_loss": loss})
            show_messages().info("step %d/%d  validation loss %.4f", trainer.global_step, trainer.max_steps, loss)
        self._last_s = time.monotonic()

    def _path(self) -> Path:
        return Path(AppState().log_dir) / self.filename

    def _append(self, line: dict[str, Any]) -> None:
        with self._path().open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def _say(self, line: dict[str, Any], max_steps: int, now_s: float) -> None:
        done = line["step"] - self._first_step
        left_s = (now_s - self._start_s) / max(done, 1) * (max_steps - line["step"])
        show_messages().info(
            "step %d/%d  loss %s  grad norm %s  lr %s  %.0f tokens/s  ETA %s",
            line["step"],
            max_steps,
            _short(line["loss"], ".4f"),
            _short(line["grad_norm"], ".3f"),
            _short(line["lr"], ".2e"),
            line["tokens_per_s"],
            duration(left_s),
        )


def _megatron(strategy: Any) -> list[torch.nn.Module]:
    """Return this rank's chunks of a NeMo Megatron strategy."""
    return list(strategy.megatron_parallel)


def _move_logs_only() -> None:
    """Let NeMo's checkpoint callback, which comes after this one, put only logs of earlier runs aside, into `run_0`.

    It moves every file of the log folder: metrics and receipt too, and the notes by which the pipeline knows a stage.
    """
    state = AppState()
    state.files_to_move = [file for file in state.files_to_move or [] if Path(file).suffix in (".log", ".txt")]


def _keep_until(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will do again."""
    if not path.is_file():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _number(value: Any) -> float | None:
    return None if value is None else round(float(value), 6)


def _short(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
