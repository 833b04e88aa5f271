"""Quantise a small random model of each class with `examples/quantise.py`: do all experts survive, and at what error?

    python -m benchmarks.quantise           # writes benchmarks/results/quantise.md
    python -m benchmarks.quantise Mixtral   # one of the classes

llm-compressor is installed in a separate environment on first use (7 GB). The example prints how far the logits of the
quantised folder are from the model's logits, for one of the texts that GPTQ reads. Small random models lose more than
trained models do, so the numbers only show that no weights are lost.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch

from benchmarks.arguments import chosen
from benchmarks.doc_tables import table
from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from tests.loading.cases import PARENTS
from tests.models import write_tokenizer


LLM_COMPRESSOR = "llmcompressor==0.14.0.1"
ROOT = Path(__file__).parents[1]
METHODS = ("fp8", "gptq")
#: 128 numbers share a scale, so these sizes are multiples of 128.
SIZES = {"layers": 2, "head_dim": 32, "hidden_size": 128, "intermediate_size": 256}
#: Class -> parent and fields of the `UpcycleSpec`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Llama", {}),
    "Glm4-MoE": ("Llama", {"router_score": "sigmoid"}),
    "Qwen3-MoE": ("Qwen3", {}),
    "Qwen2-MoE": ("Qwen2", {}),
    "FlexOlmo": ("OLMo 2", {}),
    "GraniteMoe": ("Granite 3", {}),
    "GraniteMoeShared": ("Granite 3", {"shared_experts": 1, "granularity": 2, "top_k": 4}),
}


def quantiser() -> Path:
    """Return a Python that has llm-compressor; make its environment if it is missing."""
    environment = Path(gettempdir()) / "nemo-upcycle-benchmark-llmcompressor"
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        subprocess.run([environment / "bin" / "pip", "install", "-q", LLM_COMPRESSOR], check=True)
    return python


def quantised(folder: Path, method: str, texts: Path) -> str:
    """Quantise a folder, and return the difference of its logits, or the reason why it cannot be used."""
    command = [quantiser(), ROOT / "examples/quantise.py", folder, folder.parent / method, "--method", method]
    done = subprocess.run([*command, "--texts", texts], capture_output=True, text=True, check=False)
    if "has no weights for" in done.stderr:
        return "not usable: the experts are lost"
    done.check_returncode()
    return done.stdout.strip().splitlines()[-1].split(" by ")[-1].removesuffix(" of their norm.")


def row(name: str) -> tuple[str, ...]:
    """Convert a random parent into a class, quantise it with each method, and return a row of the table."""
    parent, fields = CASES[name]
    with TemporaryDirectory() as folder:
        dense, texts = Path(folder, "dense"), Path(folder, "texts.txt")
        write_tokenizer(PARENTS[parent](dense, **SIZES))
        texts.write_text("".join(f"Text {n} has {7 * n} words and ends here.\n" for n in range(80)), encoding="utf-8")
        with open_dense(dense) as source:
            done = convert(source, Path(folder, "moe"), UpcycleSpec(**fields), dtype=torch.bfloat16, progress=False)
        return name, *(quantised(done.output, method, texts) for method in METHODS)


def main() -> None:
    """Quantise the chosen classes, and print and write the table."""
    names = chosen(__doc__, sys.argv[1:], CASES)
    page = table("class, fp8: difference, gptq: difference", (row(name) for name in names or CASES))
    print(page)
    if not names:
        head = f"`python -m benchmarks.quantise`, {LLM_COMPRESSOR}, small random models in BF16 on a CPU\n\n"
        (ROOT / "benchmarks/results/quantise.md").write_text(head + page, encoding="utf-8")


if __name__ == "__main__":
    main()
