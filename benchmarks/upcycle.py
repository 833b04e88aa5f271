"""Online upcycling against the floor and against Megatron-Core's own: time and memory, one rank, bfloat16.

    python -m benchmarks.upcycle            # writes benchmarks/results/upcycle.md
    python -m benchmarks.upcycle smollm2    # one of the models

Floor: copy the dense slices once out of the page cache, and write the shard once. Competitor: `upcycle_state_dict` of
megatron.core, from a dense Megatron model that is loaded already (its loading is not counted) into the same MoE model.
Memory: the peak of anonymous memory above what the finished MoE model (for Megatron: and the dense one) occupies.
Every measurement has a process of its own; models' memory is touched before, so no side pays for its page faults.
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
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results" / "upcycle.md"
#: Name -> experts and top-k; `smollm2` is the real model, `llama1b` has the shapes of Llama 3.2 1B and random weights.
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
REPEATS = 3


def dense_folder(name: str) -> Path:
    """Return the dense checkpoint, made or fetched on first use."""
    from nemo_upcycle.data.dense import ensure_dense

    if name == "smollm2":
        return ensure_dense("asset://smollm2-135m")
    from tests.models import write_random

    folder = Path(gettempdir()) / "nemo-upcycle-benchmark-llama1b"
    return folder if (folder / "config.json").is_file() else write_random(folder, LLAMA_1B)


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Give a function that returns the largest growth of anonymous memory since the start, in bytes."""
    base, peak, stop = _anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], _anonymous_bytes() - base)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
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
    with open_dense(folder) as dense, peak_memory() as peak_bytes:
        start_s = time.perf_counter()
        receipt = upcycle_into(moe, dense, UpcycleSpec(num_experts=experts, top_k=top_k))
        seconds = time.perf_counter() - start_s
        extra_bytes = peak_bytes()
    largest = max(parameter.nbytes for parameter in moe[0].parameters())
    return {"seconds": seconds, "extra_bytes": extra_bytes, "slice_bytes": largest, "written": receipt.bytes_written}


def megatron(folder: Path, experts: int, top_k: int) -> dict[str, float]:
    """Measure Megatron-Core's own, with the loading of its result into the model."""
    from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict

    from nemo_upcycle import open_dense
    from nemo_upcycle.connector import load_dense_into

    moe, dense = _models(folder, experts, top_k, with_dense=True)
    with open_dense(folder) as source:
        load_dense_into(dense, source)
    with peak_memory() as peak_bytes:
        start_s = time.perf_counter()
        state = upcycle_state_dict(moe, dense)
        moe[0].load_state_dict(state["model"], strict=True)
        seconds = time.perf_counter() - start_s
        extra_bytes = peak_bytes()
    return {"seconds": seconds, "extra_bytes": extra_bytes + sum(p.nbytes for p in dense[0].parameters())}


def floor(folder: Path, experts: int, top_k: int) -> dict[str, float]:
    """Measure the least that must be done: read the dense bytes once, write the shard once."""
    from nemo_upcycle import open_dense

    moe, _ = _models(folder, experts, top_k, with_dense=False)
    with open_dense(folder) as dense:
        tensors = [dense.read(name) for name in dense.names()]
        scratch = torch.empty(max(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype)
        scratch.zero_()
        start_s = time.perf_counter()
        for tensor in tensors:
            scratch[: tensor.numel()].copy_(tensor.reshape(-1))
        for parameter in moe[0].parameters():
            parameter.data.fill_(1.0)
        return {"seconds": time.perf_counter() - start_s}


WORKERS = {"floor": floor, "ours": ours, "megatron": megatron}


def measure(worker: str, model: str) -> dict[str, float]:
    """Run one measurement in a process of its own, and return the median run (by time)."""
    runs = []
    for _ in range(REPEATS):
        command = [sys.executable, "-m", "benchmarks.upcycle", "--worker", worker, model]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return sorted(runs, key=lambda run: run["seconds"])[REPEATS // 2]


def table(models: list[str]) -> str:
    """Return the results as Markdown."""
    rows = [
        "| model | what | time, s | against the floor | extra memory, MiB |",
        "|---|---|---:|---:|---:|",
    ]
    for model in models:
        experts, top_k = MODELS[model]
        found = {worker: measure(worker, model) for worker in WORKERS}
        for worker, run in found.items():
            extra = f"{run['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in run else ""
            ratio = run["seconds"] / found["floor"]["seconds"]
            label = f"{model} -> E{experts}T{top_k}"
            rows.append(f"| {label} | {worker} | {run['seconds']:.3f} | {ratio:.2f}x | {extra} |")
    return "\n".join(rows) + "\n"


def tabulate(
    arguments: list[str], known: Iterable[str], table: Callable[[list[str]], str], results: Path, how: str
) -> None:
    """Print the table of the models that the command names; with none named, of all, and keep it.

    Args:
        arguments: of the command.
        known: every model.
        table: makes the table.
        results: the file that it is kept in, named like the benchmark.
        how: often was measured.
    """
    command = f"`python -m benchmarks.{results.stem}`, {os.cpu_count()} cores, {how}"
    text = f"{command}\n\n{table(arguments or list(known))}"
    print(text)
    if not arguments:
        results.parent.mkdir(exist_ok=True)
        results.write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Measure, print, and keep the table."""
    if arguments[:1] == ["--worker"]:
        _, worker, model = arguments
        from nemo_upcycle.training.equivalence import one_rank

        with one_rank():
            print(json.dumps(WORKERS[worker](dense_folder(model), *MODELS[model])))
        return
    for model in arguments or MODELS:
        dense_folder(model)
    tabulate(arguments, MODELS, table, RESULTS, f"median of {REPEATS}")


if __name__ == "__main__":
    main(sys.argv[1:])
