"""The check of step 0 on Llama 3 8B's own sizes: time and memory on one node without a GPU.

    python -m benchmarks.rehearsal          # writes benchmarks/results/rehearsal.md; needs 17 GB on disk, 20 of memory
    python -m benchmarks.rehearsal 2        # two of its 32 layers

Weights are random (bfloat16, deviation 0.02), the tokens as well; nothing is exported: step 0 would take 95 GB.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.models import LLAMA3_8B


RESULTS = Path(__file__).parent / "results" / "rehearsal.md"
CONFIG = LLAMA3_8B | {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


def write_parent(folder: Path, layers: int) -> None:
    """Write random weights, a file a layer."""
    from safetensors.torch import save_file

    from nemo_upcycle.models.hf_config import read_architecture
    from nemo_upcycle.models.sharding import hf_shapes

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}), encoding="utf-8")
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in hf_shapes(read_architecture(folder)).items():
        part = name.removeprefix("model.layers.").partition(".")[0] if ".layers." in name else "ends"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    generator = torch.Generator().manual_seed(7)
    for file, shapes in files.items():
        weights = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape).normal_(0, 0.02, generator=generator).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(weights, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in files.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def check(folder: Path, layers: int) -> dict[str, Any]:
    """Check step 0 of the recipe's model; return what the receipt says, and what it took."""
    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.pipeline.data_stage import SAMPLE_WINDOW_TOKENS, SAMPLE_WINDOWS
    from nemo_upcycle.recipes import llama3_8b_e8t2
    from nemo_upcycle.trainers.equivalence import check_step0
    from nemo_upcycle.trainers.nemo.recipes import model_config, spec_of

    use_cpu_backend()
    recipe = llama3_8b_e8t2.pretrain_recipe()
    recipe.model.config.num_layers = layers
    shape = (SAMPLE_WINDOWS, SAMPLE_WINDOW_TOKENS)
    tokens_BS = torch.randint(CONFIG["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
    configs = [model_config(recipe, dense=dense) for dense in (False, True)]
    start_s = time.monotonic()
    receipt = check_step0(*configs, folder, spec_of(recipe), tokens_BS, None)
    return {
        **receipt.equivalence,
        "total_params": receipt.total_params,
        "exact": receipt.exact,
        "bytes_read": receipt.bytes_read,
        "bytes_needed": receipt.bytes_needed,
        "minutes": (time.monotonic() - start_s) / 60,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(words: list[str]) -> None:
    """Measure, and write the results."""
    layers = int(words[0]) if words else 32
    with TemporaryDirectory(prefix="nemo-upcycle-benchmark-") as folder:
        parent = Path(folder) / "dense"
        write_parent(parent, layers)
        found = check(parent, layers)
    text = f"""`python -m benchmarks.rehearsal`, {os.cpu_count()} cores, no GPU

| what | |
|---|---:|
| layers of Llama 3 8B's sizes, experts | {layers}, 8 |
| parameters of the upcycled model | {found["total_params"] / 1e9:.2f} billion |
| tokens compared | {found["tokens_compared"]} |
| time | {found["minutes"]:.1f} min |
| peak memory | {found["peak_gib"]:.1f} GiB |
| bytes read to fill the upcycled model once, over those needed | {found["bytes_read"] / found["bytes_needed"]:.3f} |
| largest difference of logits: Hugging Face against Megatron, float32 | {found["max_abs_logit_diff"]:.2e} |
| the same, both in Megatron, float64 | {found["max_abs_logit_diff_same_stack"]:.2e} |
| rounding of the parent itself, float32 against float64 | {found["parent_float32_rounding"]:.2e} |
| within tolerance, exact | {found["within_tolerance"]}, {found["exact"]} |
"""
    if not words:
        RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
