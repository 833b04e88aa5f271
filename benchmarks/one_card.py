"""Measure two layers of Llama 3 8B -> E8T2 on one GPU, in BF16 and each FP8 recipe: time, speed and memory.

    python -m benchmarks.one_card           # needs a CUDA device and Transformer Engine

Writes benchmarks/results/one_card.md, with the planned memory beside the measured memory. `tests/gpu` runs and checks
the same trainings.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.arguments import chosen
from tests.gpu.one_card import PRECISIONS, Sizes, planned_gib, prepare, train


RESULTS = Path(__file__).parent / "results" / "one_card.md"


def main() -> None:
    """Measure every precision, and print and write the table."""
    chosen(__doc__, sys.argv[1:])
    sizes = Sizes()
    rows = [
        "| precision | step, s | TFLOP/s (full) | MFU of its peak | reserved, GiB | planned, GiB | loss |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    with TemporaryDirectory() as folder:
        inputs = prepare(Path(folder), sizes)
        for precision in PRECISIONS:
            lines = train(sizes, *inputs, Path(folder, precision), precision)
            steady = sorted(lines[2:], key=lambda line: line["seconds"])[len(lines[2:]) // 2]
            mfu = steady["mfu"]["bf16" if precision == "bf16" else "fp8"]["full"]
            rows.append(
                f"| {precision} | {median(line['seconds'] for line in lines[2:]):.3f} "
                f"| {steady['tflops_per_gpu']['full']:.1f} | {100 * mfu:.1f} % | {lines[-1]['memory_gib']:.2f} "
                f"| {planned_gib(sizes, precision)['total']:.2f} "
                f"| {lines[0]['loss']:.3f} -> {lines[-1]['loss']:.3f} |"
            )
            print(rows[-1], flush=True)
    text = f"`python -m benchmarks.one_card`, {torch.cuda.get_device_name()}\n\n" + "\n".join(rows) + "\n"
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
