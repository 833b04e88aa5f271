"""Quantise an exported Mixture-of-Experts model with llm-compressor, and check that the result can be loaded.

    pip install llmcompressor
    python examples/quantise.py runs/mine/hf quantised --method gptq --texts texts.txt

llm-compressor splits fused experts into one linear layer per expert, so that GPTQ quantises them too. Two settings
matter. Routers stay in their type, because a rounded router chooses other experts. A shared expert stays in its type,
because its width may be no multiple of the 128 numbers that share a scale.

llm-compressor saves the experts of a Mixtral as `gate_proj`, `up_proj` and `down_proj`. transformers and servers look
for `w1`, `w3` and `w2`, and fill the experts with random numbers. So this script renames them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


SEQUENCE = 512  # tokens of a text that GPTQ reads
IGNORED = ["lm_head", "re:.*gate$", "re:.*router.*", "re:.*shared_expert.*", "re:.*shared_mlp.*"]
_MIXTRAL = re.compile(r"(block_sparse_moe\.experts\.\d+\.)(gate|up|down)_proj")
_WRITTEN = {"gate": "w1", "up": "w3", "down": "w2"}


def renamed(name: str) -> str:
    """Return the name under which Mixtral's loaders look for a tensor.

    Example:
        >>> renamed("model.layers.0.block_sparse_moe.experts.3.up_proj.weight_packed")
        'model.layers.0.block_sparse_moe.experts.3.w3.weight_packed'
    """
    return _MIXTRAL.sub(lambda found: found[1] + _WRITTEN[found[2]], name)


def rename_experts(folder: Path) -> None:
    """Rename the experts in every file of a quantised folder, and in its index."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if any(renamed(name) != name for name in tensors):
            save_file({renamed(name): tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {renamed(name): file for name, file in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def quantise(model: Path, output: Path, method: str, tokens_NS: list[list[int]]) -> None:
    """Quantise a Hugging Face folder.

    Args:
        model: folder of the exported model.
        output: folder to write.
        method: `fp8`, which needs no texts, or `gptq`: weights with 4 bits.
        tokens_NS: token ids of the texts that GPTQ reads.
    """
    recipe: Any = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=IGNORED)
    texts: dict[str, Any] = {}
    if method == "gptq":
        recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=IGNORED)
        masks = [[1] * len(tokens) for tokens in tokens_NS]
        texts["dataset"] = Dataset.from_dict({"input_ids": tokens_NS, "attention_mask": masks})
        texts |= {"num_calibration_samples": len(tokens_NS), "max_seq_length": SEQUENCE}
    oneshot(model=str(model), recipe=recipe, output_dir=str(output), **texts)
    rename_experts(output)


@torch.no_grad()
def difference(model: Path, quantised: Path, tokens_BS: torch.Tensor) -> float:
    """Return the norm of the difference between the logits of two folders, divided by the norm of the first."""
    logits = []
    for folder in (model, quantised):
        loaded, found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        missing = sorted(name for name in found["missing_keys"] if "expert" in name)
        if missing:
            raise SystemExit(f"{folder} has no weights for {missing[0]} and {len(missing) - 1} more. Do not use it.")
        logits.append(loaded(tokens_BS).logits.float())
    return float((logits[0] - logits[1]).norm() / logits[0].norm())


def main() -> None:
    """Quantise a model, load the result, and print how much the logits have changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=("fp8", "gptq"), default="gptq")
    parser.add_argument("--texts", type=Path, required=True, help="texts, one in each line; GPTQ reads the first 256")
    args = parser.parse_args()
    lines = [line for line in args.texts.read_text(encoding="utf-8").splitlines() if line.strip()][:256]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens_NS = [tokenizer(line)["input_ids"][:SEQUENCE] for line in lines]
    quantise(args.model, args.output, args.method, tokens_NS)
    error = difference(args.model, args.output, torch.tensor(tokens_NS[:1]))
    print(f"The logits of {args.output} have changed by {error:.2g} of their norm.")


if __name__ == "__main__":
    main()
