"""What logging costs the first rank at every step, beside the length of the paper's steps.

    python -m benchmarks.metrics_cost       # writes benchmarks/results/metrics_cost.md

Measured here, on a CPU and one rank: everything `MetricsLogger` does after a step (reading the counters, the
reduction, the arithmetic, JSON, TensorBoard) for models of Llama 3's depths. Not measured: the reduction's way through
a network, and the three small kernels that a router's hook adds to a layer's forward pass on a GPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


#: Seconds of a step of 512 x 8192 tokens at the paper's rates (Table 2): 128 GPUs at 5,045, 512 GPUs at 4,248 tok/s.
STEPS_S = {"128 H100, capacity 1": 512 * 8192 / (128 * 5045), "512 H100, capacity 4": 512 * 8192 / (512 * 4248)}
RESULT = Path(__file__).parent / "results/metrics_cost.md"


def _logger(folder: str, layers: int) -> tuple[Any, Any, Any]:
    """Return the callback in the middle of a run, its trainer and its model, without one."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from nemo.utils.app_state import AppState

    from nemo_upcycle.planning.hardware import known_recipe
    from nemo_upcycle.training.flops import Throughput, peaks_of
    from nemo_upcycle.training.metrics import MetricsLogger
    from nemo_upcycle.training.router_health import RouterHealth

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
    callback._throughput = Throughput(known_recipe("llama3_8b_e8t2").made, 8192, 512, peaks_of("h100"))
    return callback, trainer, SimpleNamespace(trainer=trainer)


def measure(layers: int, steps: int = 200) -> tuple[float, float]:
    """Return median and mean milliseconds of a step's logging; the mean has the dear steps in it."""
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
    return 1e3 * statistics.median(times_s), 1e3 * statistics.fmean(times_s)


def main() -> None:
    """Measure and write the table."""
    import logging

    from megatron.core import parallel_state

    from nemo_upcycle.training.cpu import use_cpu_backend

    use_cpu_backend()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    logging.getLogger("nemo_upcycle").addHandler(logging.NullHandler())
    titles = [
        "layers",
        "median, ms",
        "mean, ms",
        *(f"mean, part of a step on {name} ({s:.2f} s)" for name, s in STEPS_S.items()),
    ]
    rows = [titles, ["---"] * len(titles)]
    for layers in (32, 80):
        median_ms, mean_ms = measure(layers)
        shares = [f"{mean_ms / 10 / step_s:.2f} %" for step_s in STEPS_S.values()]
        rows.append([str(layers), f"{median_ms:.1f}", f"{mean_ms:.1f}", *shares])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
