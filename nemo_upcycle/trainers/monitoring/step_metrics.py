"""One line of metrics per training step, for NeMo and Megatron-Bridge: `metrics.jsonl`, `training.json`, the console.

The metrics work in the same way on every layout: each step ends with one small reduction over all ranks
(`router_health`), and only the first rank waits for the result.

The FLOPs come from `models.flops.flops_per_token` in two conventions, which are always labelled. `full` counts the
whole square of attention scores, as arXiv 2412.09952 does (46.8 % MFU at 462.8 TFLOP/s). `causal` counts only the
lower half, as newer NVIDIA pages do. Only model FLOPs count: recomputation, padding and dropped tokens are excluded.

The true numbers for Llama 3 8B with eight experts, top-2, and the numbers that the paper prints in its Table 1:

    parameters         47.49B, 13.67B active    printed: 34.4B, 11.8B; counts two of an extra expert's three matrices
    FLOPs a sequence   7.515e14                 printed: 7.5e14; forward and backward of 8192 tokens, full attention
    the dense parent   8.03B, 4.744e14          printed: 8B, 4.7e14
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.planning.hardware import gpu_of_device
from nemo_upcycle.trainers.metrics_file import append_line, keep_until
from nemo_upcycle.trainers.monitoring.router_health import RouterHealth, shares, sum_over_ranks
from nemo_upcycle.utils.files import write_json
from nemo_upcycle.utils.progress import duration, show_messages


CONVENTIONS = ("full", "causal")


@dataclass(frozen=True)
class StepFacts:
    """The facts about a training that its metrics need.

    Args:
        path: path of `metrics.jsonl`; `training.json` is written beside it.
        architecture: the whole model's architecture.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step.
        max_steps: steps of the training.
        gpu: GPU that MFU is computed for, named as in `peaks_of`; None: the driver's GPU, and no MFU without a driver.
        expert_distance_every: steps between two measurements of the distance between the experts' weights; the first
            and the last step are always measured.
    """

    path: Path
    architecture: Architecture
    seq_length: int
    global_batch_size: int
    max_steps: int
    gpu: str | None = None
    expert_distance_every: int = 100


class Probe(Protocol):
    """Measurements of every step that a trainer adds to the values of `StepMetrics`."""

    def local(self) -> dict[str, torch.Tensor]:
        """Return this rank's measurements since the last call, to be summed over all ranks."""

    def describe(self, summed: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the values for the step's line, computed from the sums."""


class StepMetrics:
    """Writes a line for every step on the first rank; every rank of the job needs an instance and calls its methods.

    A step's line holds `step`, `loss`, `grad_norm`, `lr`, `tokens` and `seconds`; the rates of `Throughput.of`;
    `memory_gib` (the most memory that any rank has held) and `memory_share` (this memory as a share of its GPU); for
    an MoE model `expert_load` ([L][E], each expert's share of its layer's token slots) and `router`
    (`RouterHealth.describe`, one number per layer); and the values of the probe. A validation's line holds `step` and
    `validation_loss`.

    Args:
        training: facts about the training.
        health: health of this rank's routers; None for a dense model.
        first_step: number of steps done before this start, 0 for a new training; lines of later steps are deleted.
        settings: settings to write to `training.json`.
        probe: the trainer's further measurements, on all ranks or on none.
    """

    def __init__(
        self,
        training: StepFacts,
        health: RouterHealth | None,
        first_step: int,
        settings: dict[str, Any],
        probe: Probe | None = None,
    ) -> None:
        self._training, self._health, self._first_step, self._probe = training, health, first_step, probe
        gpu = training.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else "")
        ranks = torch.distributed.get_world_size()
        self._throughput = Throughput(training.architecture, training.seq_length, ranks, peaks_of(gpu))
        if torch.distributed.get_rank() == 0:
            keep_until(training.path, first_step or -1)
            rates = {"flops_per_token": self._throughput.flops_per_token(), "card": gpu}
            write_json(training.path.with_name("training.json"), settings | rates)
            show_messages().info("%s", self._throughput.describe())
            show_messages().info("training data: %s", settings["data"])
        self._start_s = self._last_s = time.monotonic()

    def step(self, step: int, loss: Any, grad_norm: Any, lr: Any) -> dict[str, Any] | None:
        """Write a step's line and log it; only the first rank and the rank with the loss wait for a device.

        Args:
            step: number of the step, from 1 on.
            loss: loss of the step, a number or a tensor with one element, on one rank; None on the others.
            grad_norm: norm of the gradient; only the first rank's value counts.
            lr: learning rate; only the first rank's value counts.

        Returns:
            The line on the first rank, None on the others.
        """
        training = self._training
        due = step in (1, training.max_steps) or step % training.expert_distance_every == 0
        parts = self._health.local(with_experts=due) if self._health else {}
        parts |= self._probe.local() if self._probe else {}
        summed = sum_over_ranks(parts | {"memory": _own_memory(), "loss": _given(loss)})
        if summed is None:
            return None
        now_s = time.monotonic()
        held, total = max(summed["memory"].tolist())  # the row of the rank that has held the most memory
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
            **({"memory_share": round(held / total, 4)} if total else {}),
        }
        self._last_s = now_s
        self._log(line, now_s)
        if self._health:
            line["expert_load"] = [[round(share, 5) for share in row] for row in shares(summed["counts"]).tolist()]
            line["router"] = self._health.describe(summed)
        line |= self._probe.describe(summed) if self._probe else {}
        append_line(self._training.path, line)
        return line

    def validation(self, step: int, loss: Any) -> None:
        """Write a validation's loss, and exclude its time from the next step's time; every rank must call this."""
        summed = sum_over_ranks({"loss": _given(loss)})
        mean = _mean(summed["loss"]) if summed else None
        if mean is not None:
            append_line(self._training.path, {"step": step, "validation_loss": _number(mean)})
            show_messages().info("step %d/%d  validation loss %.4f", step, self._training.max_steps, mean)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the next step's time."""
        self._last_s = time.monotonic()

    def _log(self, line: dict[str, Any], now_s: float) -> None:
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
    """Return [loss, 1] on a rank that has a loss, else [0, 0]; the sum over ranks gives the mean."""
    return torch.tensor([0.0 if loss is None else float(loss), loss is not None], dtype=torch.float64)


def _mean(given: torch.Tensor) -> float | None:
    loss, ranks = given.tolist()
    return loss / ranks if ranks else None


def _own_memory() -> torch.Tensor:
    """Return [ranks, 2] (GiB): this rank's row has its peak memory and its GPU's memory; other rows are zero."""
    memory = torch.zeros(torch.distributed.get_world_size(), 2, dtype=torch.float64)
    held, total = memory_gib()
    memory[torch.distributed.get_rank()] = torch.tensor([held, total or 0.0])
    return memory


def _number(value: Any, digits: int = 6) -> float | None:
    return None if value is None else round(float(value), digits)


def _short(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def peaks_of(gpu: str) -> dict[str, float]:
    """Return the dense peaks of a GPU (TFLOP/s): `bf16` and, if it has FP8, `fp8`; empty for an unknown GPU.

    The planner's GPUs are known (`conf/planning/gpus.yaml`), in SXM form only, because PCIe and NVL cards have lower
    peaks.

    Args:
        gpu: name in `conf/planning/gpus.yaml`, or the driver's name of a GPU.

    Example:
        >>> peaks_of("NVIDIA H100 80GB HBM3")
        {'bf16': 989, 'fp8': 1979}
    """
    known = gpu_of_device(gpu)
    if known is None:
        return {}
    return {"bf16": known.bf16_tflops} | ({"fp8": known.fp8_tflops} if known.fp8_tflops else {})


@dataclass(frozen=True)
class Throughput:
    """Converts tokens and seconds into rates.

    Args:
        architecture: the whole model's architecture.
        seq_length: s, tokens of a sequence.
        gpus: ranks that share the work.
        peak_tflops: peak of one GPU by precision; empty: no MFU.

    Example:
        >>> rates = Throughput(llama3_8b_e8t2, 8192, gpus=128, peak_tflops=peaks_of("H100")).of(645_760, 1.0)
        >>> rates["tflops_per_gpu"]["full"], rates["mfu"]["bf16"]["full"]  # doctest: +SKIP
        (462.8, 0.468)
    """

    architecture: Architecture
    seq_length: int
    gpus: int
    peak_tflops: dict[str, float]

    def flops_per_token(self) -> dict[str, float]:
        """Return the FLOPs of training on one token, for each convention."""
        return {
            name: flops_per_token(self.architecture, self.seq_length, causal=name == "causal") for name in CONVENTIONS
        }

    def of(self, tokens: int, seconds: float) -> dict[str, Any]:
        """Return the rates of a step.

        Args:
            tokens: tokens of the step, over all ranks.
            seconds: duration of the step.

        Returns:
            `tokens_per_s`, `tokens_per_s_per_gpu`, `tflops_per_gpu` by convention and, if the peak is known, `mfu` by
            the peak's precision and by convention (0 to 1).
        """
        rate = tokens / max(seconds, 1e-9)
        tflops = {name: rate / self.gpus * flops / 1e12 for name, flops in self.flops_per_token().items()}
        rates: dict[str, Any] = {
            "tokens_per_s": round(rate, 1),
            "tokens_per_s_per_gpu": round(rate / self.gpus, 1),
            "tflops_per_gpu": {name: float(f"{value:.5g}") for name, value in tflops.items()},
        }
        if self.peak_tflops:
            rates["mfu"] = {
                precision: {name: round(value / peak, 5) for name, value in tflops.items()}
                for precision, peak in self.peak_tflops.items()
            }
        return rates

    def describe(self) -> str:
        """Return one line with the numbers behind the rates: parameters, FLOPs of a token, peak of a GPU."""
        arch, flops = self.architecture, self.flops_per_token()
        unit, letter = (1e9, "B") if arch.total_params >= 1e9 else (1e6, "M")
        peaks = ", ".join(f"{peak:g} TFLOP/s {name.upper()}" for name, peak in self.peak_tflops.items())
        return (
            f"{arch.total_params / unit:.2f}{letter} parameters, {arch.active_params / unit:.2f}{letter} active; "
            f"{flops['full'] / 1e9:.3g} GFLOP a token (full attention), {flops['causal'] / 1e9:.3g} (causal half); "
            f"peak of a GPU: {peaks or 'not known, no MFU'}"
        )


def memory_gib() -> tuple[float, float | None]:
    """Return the most memory that this rank has held, and the memory of its GPU, in GiB.

    On a GPU the first number is the memory that PyTorch's allocator reserved, which is the number in an out-of-memory
    error. It excludes the buffers of NCCL and cuBLAS. Without a GPU the first number is the process's peak resident
    memory, and the second is None.
    """
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, None
    total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return torch.cuda.max_memory_reserved() / 2**30, total_bytes / 2**30
