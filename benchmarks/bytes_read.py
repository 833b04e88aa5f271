"""Measure the bytes that each rank of a 512-GPU job reads to upcycle Llama 3 8B, and the bytes that the rank needs.

    python -m benchmarks.bytes_read         # writes benchmarks/results/bytes_read.md

The layout comes from the paper: TP2 PP4 VPP8 EP8 on 512 ranks. The checkpoint is a sparse safetensors file, which has
the shapes of Llama 3 8B but takes no space on the disk. Megatron's own modules are built on the meta device, for every
rank under a fake process group. Then the slices of each rank's plan (`online/plan.py`) are read from the file.

    needed     bytes of the distinct slices
    read       bytes that the source returned
    fetched    bytes of the file from the first to the last byte of each slice. If tensor parallelism cuts a matrix by
               columns, these bytes include other ranks' columns.
    node       bytes that the eight ranks of a node fetch together, divided by the bytes that they need together. The
               ranks of a node share the page cache.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.arguments import chosen
from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.safetensors_writer import safetensors_header
from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.models.sharding import hf_shapes
from nemo_upcycle.online.plan import RankCoords, param_plans
from nemo_upcycle.online.tensor_plan import ModelPlan
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.mapped_files import row_major
from nemo_upcycle.utils.progress import track
from tests.megatron_ranks import build_rank


RESULTS = Path(__file__).parent / "results" / "bytes_read.md"
LAYOUT = Layout(gpus=512, tp=2, pp=4, vp=8, ep=8)
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
Slice = tuple[str, tuple[tuple[int, int], ...]]


def write_sparse(folder: Path) -> None:
    """Write a checkpoint with the right shapes that takes no space on the disk."""
    shapes = hf_shapes(architecture_from_config(LLAMA_3_8B))
    sizes = ((name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items())
    header = safetensors_header(sizes)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(math.prod(shape) for shape in shapes.values()) * 2)
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B), encoding="utf-8")


def slices_of(rank: int, dense: DenseSource, spec: UpcycleSpec) -> Iterator[Slice]:
    """Yield the slices that a rank reads, in reading order; a slice may occur twice."""
    arch = dense.architecture
    moe_arch = arch.upcycled(spec)
    with megatron_rank(LAYOUT, rank):
        for chunk in build_rank(moe_arch, LAYOUT):
            for plan in param_plans(chunk, ModelPlan(arch, moe_arch, spec), RankCoords.here()):
                yield from ((slice_.name, slice_.bounds) for slice_ in plan.made_of.slices)


def size_bytes(slices: set[Slice]) -> int:
    """Return the total bytes of some slices."""
    return sum(math.prod(stop - start for start, stop in bounds) * 2 for _, bounds in slices)


def spans(slices: set[Slice], dense: DenseSource) -> dict[str, set[tuple[int, int]]]:
    """Return, for each tensor, the byte range from the first to the last byte of every slice."""
    found: dict[str, set[tuple[int, int]]] = {}
    for name, bounds in slices:
        strides = row_major(tuple(dense.shape(name)))
        first = sum(start * stride for (start, _), stride in zip(bounds, strides, strict=True))
        last = sum((stop - 1) * stride for (_, stop), stride in zip(bounds, strides, strict=True))
        found.setdefault(name, set()).add((2 * first, 2 * (last + 1)))
    return found


def union_bytes(found: dict[str, set[tuple[int, int]]]) -> int:
    """Return the number of bytes in the union of the ranges of each tensor."""
    total = 0
    for ranges in found.values():
        end = 0
        for start, stop in sorted(ranges):
            total += max(0, stop - max(start, end))
            end = max(end, stop)
    return total


def main() -> None:
    """Measure every rank, and print and write the table."""
    chosen(__doc__, sys.argv[1:])
    spec = UpcycleSpec(num_experts=8, top_k=2)
    read_over, fetched_over, node_over, needed_gib = [], [], [], []
    with TemporaryDirectory() as folder:
        write_sparse(Path(folder))
        with open_dense(folder) as dense:
            together: set[Slice] = set()
            for rank in track(range(LAYOUT.gpus), "ranks", total=LAYOUT.gpus):
                before, wanted = dense.bytes_read, set()
                for name, bounds in slices_of(rank, dense, spec):
                    wanted.add((name, bounds))
                    dense.read(name, bounds)
                needed = size_bytes(wanted)
                needed_gib.append(needed / 2**30)
                read_over.append((dense.bytes_read - before) / needed)
                fetched_over.append(union_bytes(spans(wanted, dense)) / needed)
                together |= wanted
                if rank % 8 == 7:
                    node_over.append(union_bytes(spans(together, dense)) / size_bytes(together))
                    together = set()
    rows = [
        ("needed, GiB a rank", needed_gib),
        ("read / needed", read_over),
        ("fetched / needed", fetched_over),
        ("node: fetched / needed", node_over),
    ]
    text = f"`python -m benchmarks.bytes_read`, {LAYOUT}, {LAYOUT.gpus} ranks\n\n| | least | most |\n|---|---:|---:|\n"
    text += "".join(f"| {name} | {min(values):.4f} | {max(values):.4f} |\n" for name, values in rows)
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
