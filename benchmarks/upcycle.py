"""Compare online upcycling with its floor and with Megatron-Core's upcycling: time and memory, one rank, bfloat16.

    python -m benchmarks.upcycle            # writes benchmarks/results/upcycle.md
    python -m benchmarks.upcycle smollm2    # one of the models

The floor copies the dense slices once from the page cache and writes the shard once. `floor` writes the same number
everywhere. `floor, copying` copies numbers from the processor's cache. Copying is slower, but real weights need it.
The competitor is `upcycle_state_dict` of megatron.core. It fills the same MoE model from a dense Megatron model that
is already loaded. The time to load the dense model is not counted. The reported memory is the peak of anonymous memory
minus the memory of the finished MoE model. For Megatron-Core, the peak includes the dense model. Memory is measured in
separate runs, because watching the memory takes time. Every measurement has a separate process. The models' memory is
touched before the measurement, so that no worker pays for page faults. The workers take turns, because a machine's
speed changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import gettempdir
from typing import Any

import torch

from benchmarks.arguments import chosen


RESULTS = Path(__file__).parent / "results" / "upcycle.md"
#: name of a model -> experts and top-k. `smollm2` is the real model; `llama1b` has the shapes of Llama 3.2 1B and
#: random weights.
MODELS = {"smollm2": (8, 2), "llama1b": (4, 2)}
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
}
REPEATS = 5
CACHED_ELEMENTS = 1 << 20
#: Environment variable that tells a worker whether to watch its memory.
WATCHED = "NEMO_UPCYCLE_BENCHMARK_WATCHED"


def dense_folder(name: str) -> Path:
    """Return the folder of the dense checkpoint; make or fetch it on first use."""
    from nemo_upcycle.sources.fetch import ensure_dense

    if name == "smollm2":
        return ensure_dense("asset://smollm2-135m")
    from tests.models import write_random

    folder = Path(gettempdir()) / "nemo-upcycle-benchmark-llama1b"
    return folder if (folder / "config.json").is_file() else write_random(folder, LLAMA_1B)


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def timed() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the largest growth of anonymous memory since the start (bytes).

    The CPU's stand-in for CUDA intercepts every torch call and is needed only to build models, so it is off inside the
    block.
    """
    base, peak, stop = _anonymous_bytes(), [0], threading.Event()
    if os.environ.get(WATCHED) == "0":
        stop.set()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], _anonymous_bytes() - base)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with torch._C.DisableTorchFunction():
            yield lambda: max(peak[0], _anonymous_bytes() - base)
    finally:
        stop.set()
        thread.join()


def _models(folder: Path, experts: int, top_k: int, *, with_dense: bool) -> tuple[list[Any], list[Any]]:
    from tests.models import build_chunks

    common = {"params_dtype": torch.bfloat16, "bf16": True, "perform_initialization": False}
    moe = build_chunks(folder, num_experts=experts, top_k=top_k, **common)
    dense = build_chunks(folder, num_experts=None, **common) if with_dense else []
    for chunk in (*moe, *dense):
        for parameter in chunk.parameters():
            parameter.data.zero_()
    return moe, dense


def ours(folder: Path, experts: int, top_k: int) -> dict[str, float]:
    """Measure `upcycle_into`."""
    from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into

    moe, _ = _models(folder, experts, top_k, with_dense=False)
    with open_dense(folder) as dense, timed() as peak_bytes:
        start_s = time.perf_counter()
        upcycle_into(moe, dense, UpcycleSpec(num_experts=experts, top_k=top_k))
        return {"seconds": time.perf_counter() - start_s, "extra_bytes": peak_bytes()}


def megatron(folder: Path, experts: int, top_k: int) -> dict[str, float]:
    """Measure Megatron-Core's `upcycle_state_dict`, including the loading of its result into the model."""
    from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict

    from nemo_upcycle import open_dense
    from nemo_upcycle.online.upcycle import load_dense_into

    moe, dense = _models(folder, experts, top_k, with_dense=True)
    with open_dense(folder) as source:
        load_dense_into(dense, source)
    with timed() as peak_bytes:
        start_s = time.perf_counter()
        state = upcycle_state_dict(moe, dense)
        moe[0].load_state_dict(state["model"], strict=True)
        seconds = time.perf_counter() - start_s
        extra_bytes = peak_bytes() + sum(p.nbytes for p in dense[0].parameters())
    return {"seconds": seconds, "extra_bytes": extra_bytes}


def floor(folder: Path, experts: int, top_k: int, *, copying: bool = False) -> dict[str, float]:
    """Measure the minimum work: read the dense bytes once, and write the shard once."""
    from nemo_upcycle import open_dense

    moe, _ = _models(folder, experts, top_k, with_dense=False)
    with open_dense(folder) as dense, timed():
        tensors = [dense.read(name) for name in dense.names()]
        scratch = torch.zeros(max(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype)
        start_s = time.perf_counter()
        for tensor in tensors:
            scratch[: tensor.numel()].copy_(tensor.reshape(-1))
        for parameter in moe[0].parameters():
            if not copying:
                parameter.data.fill_(1.0)
                continue
            for block in parameter.data.view(-1).split(CACHED_ELEMENTS):
                block.copy_(scratch[: block.numel()])
        return {"seconds": time.perf_counter() - start_s}


WORKERS = {"floor": floor, "floor, copying": partial(floor, copying=True), "ours": ours, "megatron": megatron}


def measure(worker: str, model: str, *, watched: bool) -> dict[str, float]:
    """Run one measurement in a separate process."""
    command = [sys.executable, "-m", "benchmarks.upcycle", "--worker", worker, model]
    environment = os.environ | {WATCHED: str(int(watched))}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def table(models: list[str]) -> str:
    """Return the results as Markdown."""
    rows = [
        "| model | what | time, s: median (all) | over the floor | over the floor, copying | extra memory, MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in models:
        experts, top_k = MODELS[model]
        seconds: dict[str, list[float]] = {worker: [] for worker in WORKERS}
        for _ in range(REPEATS):
            for worker, runs in seconds.items():
                runs.append(measure(worker, model, watched=False)["seconds"])
        middle_s = {worker: median(runs) for worker, runs in seconds.items()}
        for worker, runs in seconds.items():
            extra = ""
            if not worker.startswith("floor"):
                extra = f"{measure(worker, model, watched=True)['extra_bytes'] / 2**20:.0f}"
            ratios = [f"{middle_s[worker] / middle_s[other]:.2f}x" for other in ("floor", "floor, copying")]
            every = ", ".join(f"{run:.3f}" for run in runs)
            label = f"{model} -> E{experts}T{top_k}"
            rows.append(f"| {label} | {worker} | {middle_s[worker]:.3f} ({every}) | {' | '.join(ratios)} | {extra} |")
    return "\n".join(rows) + "\n"


def tabulate(
    arguments: list[str], known: Iterable[str], table: Callable[[list[str]], str], results: Path, how: str
) -> None:
    """Print the table of the named models; if none is named, print and write the table of all models.

    Args:
        arguments: names of models.
        known: names of all models.
        table: function that measures some models and returns their table.
        results: file for the table, named like the benchmark.
        how: description of the measurement, for example the number of runs.
    """
    command = f"`python -m benchmarks.{results.stem}`, {os.cpu_count()} cores, {how}"
    text = f"{command}\n\n{table(arguments or list(known))}"
    print(text)
    if not arguments:
        results.parent.mkdir(exist_ok=True)
        results.write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Measure, and print and write the table."""
    if arguments[:1] == ["--worker"]:
        _, worker, model = arguments
        from nemo_upcycle.trainers.equivalence import one_rank

        with one_rank():
            print(json.dumps(WORKERS[worker](dense_folder(model), *MODELS[model])))
        return
    arguments = chosen(__doc__, arguments, MODELS)
    for model in arguments or MODELS:
        dense_folder(model)
    tabulate(arguments, MODELS, table, RESULTS, f"{REPEATS} runs in turn")


if __name__ == "__main__":
    main(sys.argv[1:])
