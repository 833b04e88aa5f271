"""Upcycling from files that are not in the page cache: against a sequential read, and what ranks fetch together.

    python -m benchmarks.cold_read          # writes benchmarks/results/cold_read.md

The model has Llama 3.2 1B's shapes (2.5 GB). Before every run its pages are dropped from the cache. `cat` is what the
disk gives to one sequential reader; `map only` is the same upcycling without the reads ahead of it, by page faults;
`safetensors` copies every tensor out of safetensors' own reader and builds nothing. For several ranks on one machine,
`fetched` is what all of them together read from the disk (`/proc/self/io`), over the size of the file: 1 is each byte
once, whoever needs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.upcycle import MODELS, dense_folder
from tests.distributed.ranks import run_ranks


RESULTS = Path(__file__).parent / "results" / "cold_read.md"
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1 rank": (1, {}),
    "2 ranks, EP2": (2, {"ep": 2}),
    "4 ranks, TP2 EP4": (4, {"tp": 2, "ep": 4}),
}
REPEATS = 3


def drop_pages(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def fetched_bytes() -> int:
    """Return what this process has read from disks."""
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def upcycle(folder: str, layout: dict[str, int], map_only: bool) -> tuple[float, int]:
    """Upcycle on this rank; return seconds and bytes from the disk. The models' memory is touched before."""
    from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
    from nemo_upcycle.sources import mapped_files
    from tests.models import build_chunks

    if map_only:
        mapped_files._NOWAIT = None  # as on systems that have none
    experts, top_k = MODELS["llama1b"]
    settings: dict[str, Any] = {"params_dtype": torch.bfloat16, "bf16": True, "perform_initialization": False}
    chunks = build_chunks(Path(folder), num_experts=experts, top_k=top_k, layout=layout, **settings)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        drop_pages(Path(folder) / "model.safetensors")
    torch.distributed.barrier()
    start_s, before = time.perf_counter(), fetched_bytes()
    with open_dense(folder) as dense:
        upcycle_into(chunks, dense, UpcycleSpec(num_experts=experts, top_k=top_k))
    seconds, fetched = time.perf_counter() - start_s, fetched_bytes() - before
    torch.distributed.barrier()
    return seconds, fetched


def read_by_safetensors(file: Path) -> float:
    """Return the seconds that safetensors takes to copy every tensor into memory that is there already."""
    from safetensors import safe_open

    scratch = torch.zeros(file.stat().st_size // 2, dtype=torch.bfloat16)
    drop_pages(file)
    start_s = time.perf_counter()
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            tensor = opened.get_tensor(name)
            scratch[: tensor.numel()].copy_(tensor.reshape(-1))
    return time.perf_counter() - start_s


def cat(file: Path) -> float:
    """Return the seconds of one sequential reader."""
    drop_pages(file)
    start_s = time.perf_counter()
    subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start_s


def on_ranks(folder: Path, world_size: int, layout: dict[str, int], map_only: bool) -> tuple[float, float]:
    """Return the seconds of the slowest rank, and what all fetched over the file's size."""
    file_bytes = (folder / "model.safetensors").stat().st_size
    found = run_ranks(upcycle, world_size, str(folder), layout, map_only, timeout_s=600)
    return max(seconds for seconds, _ in found), sum(fetched for _, fetched in found) / file_bytes


def median_of(measure: Callable[[], Any]) -> Any:
    """Return the median run, by seconds."""
    return sorted(measure() for _ in range(REPEATS))[REPEATS // 2]


def main() -> None:
    """Measure, print, and keep the table."""
    folder = dense_folder("llama1b")
    file = folder / "model.safetensors"
    disk_s = median([cat(file) for _ in range(REPEATS)])
    rows = ["| what | time, s | against cat | fetched / file |", "|---|---:|---:|---:|"]

    def add(name: str, seconds: float, fetched: str = "") -> None:
        rows.append(f"| {name} | {seconds:.2f} | {seconds / disk_s:.2f}x | {fetched} |")
        print(rows[-1], flush=True)

    add("cat", disk_s)
    add("safetensors", median([read_by_safetensors(file) for _ in range(REPEATS)]))
    for name, (world_size, layout) in LAYOUTS.items():
        for map_only in (False, True):
            seconds, fetched = median_of(
                lambda w=world_size, where=layout, only=map_only: on_ranks(folder, w, where, only)
            )
            add(f"upcycle, {name}" + (", map only" if map_only else ""), seconds, f"{fetched:.3f}")
    text = (
        f"`python -m benchmarks.cold_read`, {os.cpu_count()} cores, median of {REPEATS}\n\n" + "\n".join(rows) + "\n"
    )
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
