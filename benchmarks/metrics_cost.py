"""Measure what logging costs the first rank at every step, compared with the length of the paper's steps.

    python -m benchmarks.metrics_cost       # writes benchmarks/results/metrics_cost.md

Measured here, on a CPU and one rank: everything `MetricsLogger` does after a step (reading the counters, the
reduction, the arithmetic, JSON, TensorBoard) for models of Llama 3's depths. Not measured: the network time of the
reduction, and the three small kernels that a router's hook adds to a layer's forward pass on a GPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


#: Recipe, layers, GPUs and the TFLOP/s of one (full attention) of published runs: arXiv 2412.09952, Table 2, and for
#: the 70B the 41.6 % MFU of arXiv 2504.14960 on 256 H100. Where that run had fewer GPUs, its rate is used.
RUNS = (
    ("llama3_8b_e8t2", 32, 128, 462.8),
    ("llama3_8b_e8t2", 32, 512, 389.7),
    ("llama3_70b_e8t2", 80, 512, 411.7),
)
STEP_TOKENS = 512 * 8192
RESULT = Path(__file__).parent / "results/metrics_cost.md"


def _logger(folder: str, layers: int) -> tuple[Any, Any, Any]:
    """Return the callback in the middle of a run, its trainer and its model, without one."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from nemo.utils.app_state import AppState

    from nemo_upcycle.monitoring.router_health import RouterHealth
    from nemo_upcycle.monitoring.step_metrics import Throughput, peaks_of
    from nemo_upcycle.planning.hardware import known_recipe
    from nemo_upcycle.trainers.nemo.metrics import MetricsLogger

    AppState().log_dir = folder
    config = SimpleNamespace(
        num_layers=layers, num_moe_experts=8, moe_router_topk=2, moe_router_load_balancing_type="aux_loss",
        ffn_hidden_size=14336, moe_ffn_hidden_size=14336, hidden_size=4096, gated_linear_unit=True,
    )  # fmt: skip
    data = SimpleNamespace(data_sampler=SimpleNamespace(global_batch_size=512, seq_len=8192))
    trainer = SimpleNamespace(
        global_step=0, max_steps=10**9, log_every_n_steps=10, datamodule=data,
        loggers=[TensorBoardLogger(folder)], callback_metrics={"reduced_train_loss": torch.tensor(2.0)},
    )  # fmt: skip
    callback = MetricsLogger()
    callback._health = RouterHealth([], config)
    callback._throughput = Throughput(known_recipe("llama3_8b_e8t2").arch, 8192, 512, peaks_of("h100"))
    return callback, trainer, SimpleNamespace(trainer=trainer)


def measure(layers: int, steps: int = 200) -> tuple[float, float]:
    """Return median and mean milliseconds of a step's logging; the mean includes the expensive steps."""
    times_s = []
    with tempfile.TemporaryDirectory() as folder:
        callback, trainer, model = _logger(folder, layers)
        for step in range(1, steps + 1):
            trainer.global_step = step
            callback._health._counts_LE += torch.rand(layers, 8, dtype=torch.float64) * 1e6
            callback._health._slots_L += 8e6
            start_s = time.perf_counter()
            callback.on_train_batch_end(trainer, model, None, None, 0)
            times_s.append(time.perf_counter() - start_s)
        trainer.loggers[0].finalize("success")  # TensorBoard writes from a thread of its own
    return 1e3 * statistics.median(times_s), 1e3 * statistics.fmean(times_s)


def main() -> None:
    """Measure and write the table."""
    import logging

    from megatron.core import parallel_state

    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.models.flops import flops_per_token
    from nemo_upcycle.planning.hardware import known_recipe

    use_cpu_backend()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    logging.getLogger("nemo_upcycle").addHandler(logging.NullHandler())
    rows = [["recipe", "H100", "step, s", "logging, median, ms", "logging, mean, ms", "part of the step"], ["---"] * 6]
    for name, layers, gpus, tflops in RUNS:
        flops = flops_per_token(known_recipe(name).arch, 8192, causal=False)
        step_s = STEP_TOKENS * flops / (gpus * tflops * 1e12)
        median_ms, mean_ms = measure(layers)
        share = f"{mean_ms / 10 / step_s:.2f} %"
        rows.append([name, str(gpus), f"{step_s:.2f}", f"{median_ms:.1f}", f"{mean_ms:.1f}", share])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
