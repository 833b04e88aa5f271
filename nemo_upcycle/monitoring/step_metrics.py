"""One line of metrics per training step, whatever trains: `metrics.jsonl`, `training.json`, and a line for people.

Works the same on every layout: each step ends with one small reduction in which all ranks take part (`router_health`),
and only the first rank waits for it.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.monitoring.router_health import RouterHealth, shares, sum_over_ranks
from nemo_upcycle.monitoring.throughput import Throughput, memory_gib, peaks_of
from nemo_upcycle.utils.files import whole_file, write_json
from nemo_upcycle.utils.progress import duration, show_messages


@dataclass(frozen=True)
class TrainingFacts:
    """What the metrics of a training need to know of it.

    Args:
        path: of `metrics.jsonl`; `training.json` is beside it.
        architecture: of the whole model.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step.
        max_steps: steps of the training.
        card: the card that MFU is stated for, as in `peaks_of`; None asks the driver, and states none without it.
        expert_distance_every: steps between two looks at the experts' weights; the first and the last step have one.
    """

    path: Path
    architecture: Architecture
    seq_length: int
    global_batch_size: int
    max_steps: int
    card: str | None = None
    expert_distance_every: int = 100


class StepMetrics:
    """Writes a line for every step, on the first rank; every rank of the job has one and calls it.

    A step's line holds `step`, `loss`, `grad_norm`, `lr`, `tokens`, `seconds`; the rates of `Throughput.of`;
    `memory_gib` (the most that any rank has held) and `memory_share` of its card; and, of an MoE model,
    `expert_load` ([L][E], each expert's share of its layer's token slots) and `router` (`RouterHealth.describe`, one
    number a layer). A validation has a line with `step` and `validation_loss`.

    Args:
        training: what is trained.
        health: that watches the routers of this rank; None for a dense model.
        first_step: after which the training starts, 0 for a new one; lines of later steps are deleted.
        settings: for `training.json`.
    """

    def __init__(
        self, training: TrainingFacts, health: RouterHealth | None, first_step: int, settings: dict[str, Any]
    ) -> None:
        self._training, self._health, self._first_step = training, health, first_step
        card = training.card or (torch.cuda.get_device_name() if torch.cuda.is_available() else "")
        ranks = torch.distributed.get_world_size()
        self._throughput = Throughput(training.architecture, training.seq_length, ranks, peaks_of(card))
        if torch.distributed.get_rank() == 0:
            _keep_until(training.path, first_step or -1)
            rates = {"flops_per_token": self._throughput.flops_per_token(), "card": card}
            write_json(training.path.with_name("training.json"), settings | rates)
            show_messages().info("%s", self._throughput.describe())
            show_messages().info("training data: %s", settings["data"])
        self._start_s = self._last_s = time.monotonic()

    def step(self, step: int, loss: Any, grad_norm: Any, lr: Any) -> dict[str, Any] | None:
        """Write a step's line, and say it. No other rank than the first, and that with the loss, waits for a device.

        Args:
            step: its number, from 1 on.
            loss: of the step, a number or a tensor of one, on the one rank that gives it; None on all others.
            grad_norm: norm of the gradient; that of the first rank counts.
            lr: learning rate, likewise.

        Returns:
            The line, on the first rank.
        """
        training = self._training
        due = step in (1, training.max_steps) or step % training.expert_distance_every == 0
        parts = self._health.local(with_experts=due) if self._health else {}
        summed = sum_over_ranks(parts | {"memory": _own_memory(), "loss": _given(loss)})
        if summed is None:
            return None
        now_s = time.monotonic()
        held, card = max(summed["memory"].tolist())  # of the rank that has held the most
        step_tokens = training.global_batch_size * training.seq_length
        line: dict[str, Any] = {
            "step": step,
            "loss": _number(_mean(summed["loss"])),
            "grad_norm": _number(grad_norm),
            "lr": _number(lr, 12),
            "tokens": step * step_tokens,
            "seconds": round(now_s - self._last_s, 3),
            **self._throughput.of(step_tokens, now_s - self._last_s),
            "memory_gib": round(held, 3),
            **({"memory_share": round(held / card, 4)} if card else {}),
        }
        self._last_s = now_s
        self._say(line, now_s)
        if self._health:
            line["expert_load"] = [[round(share, 5) for share in row] for row in shares(summed["counts"]).tolist()]
            line["router"] = self._health.describe(summed)
        self._append(line)
        return line

    def validation(self, step: int, loss: Any) -> None:
        """Write a validation's loss, and leave its time out of the next step's; every rank calls it, as `step`."""
        summed = sum_over_ranks({"loss": _given(loss)})
        found = _mean(summed["loss"]) if summed else None
        if found is not None:
            self._append({"step": step, "validation_loss": _number(found)})
            show_messages().info("step %d/%d  validation loss %.4f", step, self._training.max_steps, found)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the next step's time what was done since the last one."""
        self._last_s = time.monotonic()

    def _append(self, line: dict[str, Any]) -> None:
        with self._training.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def _say(self, line: dict[str, Any], now_s: float) -> None:
        max_steps = self._training.max_steps
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


def _given(loss: Any) -> torch.Tensor:
    """Return a loss and how many ranks give it, 1; two zeros on a rank that gives none."""
    return torch.tensor([0.0 if loss is None else float(loss), loss is not None], dtype=torch.float64)


def _mean(given: torch.Tensor) -> float | None:
    loss, ranks = given.tolist()
    return loss / ranks if ranks else None


def _own_memory() -> torch.Tensor:
    """Return GiB held and GiB of the card in this rank's row of [ranks, 2]; in a sum each rank has its own."""
    memory = torch.zeros(torch.distributed.get_world_size(), 2, dtype=torch.float64)
    held, card = memory_gib()
    memory[torch.distributed.get_rank()] = torch.tensor([held, card or 0.0])
    return memory


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
