"""Upcycling from cold files, by several ranks of one machine: bytes that leave the disk, and how long it takes.

    python -m benchmarks.cold_files           # writes benchmarks/results/cold_files.md
    python -m benchmarks.cold_files smollm2   # one of the models

The checkpoint's pages are dropped from the page cache before every run. Floor: one process reads the file from one
end to the other in blocks of 8 MiB. `load_file` is what a job would do that loads the dense checkpoint on each of
its ranks (safetensors' own function, and every number looked at once). `from disk` is what the kernel counts for
the processes (`read_bytes` of /proc/self/io), so what one rank finds in the page cache because another has read it
does not count; `asked for` is what the ranks' parameters are made of, together. Models' memory is touched before
the time is taken.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.upcycle import MODELS, dense_folder, tabulate
from tests.distributed.ranks import run_ranks
from tests.models import build_chunks


RESULTS = Path(__file__).parent / "results" / "cold_files.md"
REPEATS = 3
_BLOCK_BYTES = 8 << 20
#: Ranks over which the experts are spread: all experts are made of the same network, so each rank asks for all of it.
LAYOUTS: tuple[tuple[int, dict[str, int]], ...] = ((1, {}), (2, {"ep": 2}), (4, {"ep": 4}))


def make_cold(folder: Path) -> None:
    """Drop the checkpoint from the page cache.

    Raises:
        RuntimeError: the file system keeps it.
    """
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            raise RuntimeError(f"{path} stays in the page cache")


def from_disk_bytes() -> int:
    """Read the number of bytes that the kernel has fetched from disks for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _timed(work: Any) -> dict[str, float]:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    before, start_s = from_disk_bytes(), time.perf_counter()
    asked = work()
    return {"seconds": time.perf_counter() - start_s, "disk": from_disk_bytes() - before, "asked": asked}


def sequential(folder: Path) -> dict[str, float]:
    """Read the files from one end to the other."""

    def read() -> int:
        total, block = 0, bytearray(_BLOCK_BYTES)
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(block):
                    total += count
        return total

    return _timed(read)


def load_file(folder: Path) -> dict[str, float]:
    """Load everything, as a job does that has no online upcycling."""
    from safetensors.torch import load_file as load

    def read() -> int:
        total = 0
        for path in sorted(folder.glob("*.safetensors")):
            for tensor in load(path).values():
                tensor.view(torch.uint8).sum()
                total += tensor.nbytes
        return total

    return _timed(read)


def ours(folder: Path, experts: int, top_k: int, layout: dict[str, int]) -> dict[str, float]:
    """Upcycle this rank's shard."""
    from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into

    common = {"params_dtype": torch.bfloat16, "bf16": True, "perform_initialization": False}
    chunks = build_chunks(folder, num_experts=experts, top_k=top_k, layout=layout, **common)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    spec = UpcycleSpec(num_experts=experts, top_k=top_k)

    def read() -> int:
        with open_dense(folder) as dense:
            return upcycle_into(chunks, dense, spec).bytes_read

    return _timed(read)


def table(models: list[str]) -> str:
    """Return the results as Markdown."""
    rows = [
        "| model | what | ranks | seconds (all) | over the floor | from disk / file | asked for / file |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for model in models:
        folder = dense_folder(model)
        file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        works: list[tuple[str, int, Any, tuple[Any, ...]]] = [("floor: read in sequence", 1, sequential, ())]
        for ranks, layout in LAYOUTS:
            works.append(("load_file", ranks, load_file, ()))
            name = "ours " + ",".join(f"{key}={size}" for key, size in layout.items())
            works.append((name, ranks, ours, (*MODELS[model], layout)))
        found: list[list[list[dict[str, float]]]] = [[] for _ in works]
        for _ in range(REPEATS):
            for runs, (_, ranks, work, arguments) in zip(found, works, strict=True):
                make_cold(folder)
                runs.append(run_ranks(work, ranks, folder, *arguments, timeout_s=600))
        floor_s = min(max(rank["seconds"] for rank in run) for run in found[0])
        for runs, (name, ranks, _, _) in zip(found, works, strict=True):
            times = [max(rank["seconds"] for rank in run) for run in runs]
            disk, asked = (
                max(sum(rank[key] for rank in run) for run in runs) / file_bytes for key in ("disk", "asked")
            )
            every = ", ".join(f"{seconds:.2f}" for seconds in times)
            best = min(times)
            rows.append(
                f"| {model} ({file_bytes / 1e9:.2f} GB) | {name} | {ranks} | {best:.2f} ({every})"
                f" | {best / floor_s:.2f}x | {disk:.3f} | {asked:.2f} |"
            )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    for model in sys.argv[1:] or MODELS:
        dense_folder(model)
    tabulate(sys.argv[1:], MODELS, table, RESULTS, f"best of {REPEATS}, in turn, cold")
