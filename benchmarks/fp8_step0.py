"""What FP8 and NVFP4 do to an upcycled model at step 0: SmolLM2-135M and its E8T2 in BF16 and each recipe, on a CPU.

    python -m benchmarks.fp8_step0 DENSE HELDOUT    # writes benchmarks/results/fp8_step0.md

DENSE is the parent's Hugging Face folder, HELDOUT a blend's `heldout.jsonl`: real text that the model reads. Distances
are of logits, and of what every layer hands on: the norm of the difference over the norm of the parent's in BF16, of
each sequence; mean and standard error over sequences.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.cpu.fp8_recipe import Fp8Recipe, update_scales
from nemo_upcycle.cpu.one_rank import one_rank
from nemo_upcycle.evaluation.arms import mean_of
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.trainers.equivalence import megatron_logits
from tests.models import build_chunks, moe_settings


RESULTS = Path(__file__).parent / "results" / "fp8_step0.md"
SPEC = UpcycleSpec(num_experts=8, top_k=2)
SEQUENCES, LENGTH = 8, 128
#: Name -> what Megatron is told; delayed scaling starts with every scale at 1, and then knows them.
PRECISIONS: dict[str, str | None] = {
    "BF16": None,
    "delayed, first pass": "delayed",
    "delayed, second pass": "delayed",
    "tensorwise": "tensorwise",
    "blockwise": "blockwise",
    "mxfp8": "mxfp8",
}


def read_tokens(dense: Path, heldout: Path) -> torch.Tensor:
    """Return the first sequences of the held-out text, [B, S]."""
    from transformers import AutoTokenizer

    texts = [json.loads(line)["text"] for line in heldout.read_text().splitlines()]
    tokens = AutoTokenizer.from_pretrained(dense)("\n".join(texts))["input_ids"]
    return torch.tensor(tokens[: SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)


class Pass:
    """A forward pass: logits [B, S, V], what every layer hands on [B, S, D], the loss of each sequence, seconds."""

    def __init__(self, model: Any, tokens_BS: torch.Tensor) -> None:
        layers: list[torch.Tensor] = []
        keep = lambda _, __, output: layers.append(output[0].detach().float().transpose(0, 1))  # noqa: E731
        hooks = [layer.register_forward_hook(keep) for layer in model.decoder.layers]
        started = time.perf_counter()
        self.logits = megatron_logits(model, tokens_BS).float()
        self.seconds = time.perf_counter() - started
        self.layers = layers
        for hook in hooks:
            hook.remove()
        flat = self.logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()
        self.losses = torch.nn.functional.cross_entropy(*flat, reduction="none").view(len(tokens_BS), -1).mean(1)


def built(dense: Any, spec: UpcycleSpec | None) -> Any:
    """Return the model in BF16, filled."""
    experts = moe_settings(dense.architecture, spec) if spec else {"num_experts": None}
    (model,) = build_chunks(
        dense.architecture, bf16=True, params_dtype=torch.bfloat16, perform_initialization=False, **experts
    )
    if spec:
        upcycle_into([model], dense, spec)
    else:
        load_dense_into([model], dense)
    return model.eval()


def measured(model: Any, tokens_BS: torch.Tensor, recipe: str | None) -> Pass:
    """Return a pass by a recipe."""
    model.config.fp8, model.config.fp8_recipe = ("hybrid", recipe) if recipe else (None, None)
    model.config.fp8_amax_history_len, model.config.fp8_amax_compute_algo = 1024, "max"
    model.set_is_first_microbatch()
    return Pass(model, tokens_BS)


def distances(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the distance of each sequence from the parent's, in per cent."""
    return 100 * (got - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)


def with_interval(each: torch.Tensor) -> str:
    """Write the mean, and half of its 95 % interval."""
    mean = mean_of(each.tolist())
    return f"{mean['value']:.3f} ± {mean['high'] - mean['value']:.3f}"


def tables(dense: dict[str, Pass], moe: dict[str, Pass]) -> str:
    """Return the two tables in Markdown."""
    parent = dense["BF16"]
    rows = [
        "| precision | logits, %: dense | MoE | loss over BF16's: dense | MoE | time over BF16's: dense | MoE |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dense:
        cells = [with_interval(distances(model[name].logits, parent.logits)) for model in (dense, moe)]
        cells += [with_interval(model[name].losses - parent.losses) for model in (dense, moe)]
        cells += [f"{model[name].seconds / model['BF16'].seconds:.1f}x" for model in (dense, moe)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    layers = ["| layer | " + " | ".join(dense) + " |", "|---|" + "---:|" * len(dense)]
    for number, wanted in enumerate(parent.layers):
        means = [
            " / ".join(f"{distances(model[name].layers[number], wanted).mean():.2f}" for model in (dense, moe))
            for name in dense
        ]
        layers.append(f"| {number + 1} | {' | '.join(means)} |")
    return "\n".join([*rows, "", "After every layer, %, dense / MoE:", "", *layers])


@torch.no_grad()
def main(dense_folder: Path, heldout: Path) -> None:
    """Measure, and keep after every precision what there is."""
    tokens_BS = read_tokens(dense_folder, heldout)
    dense: dict[str, Pass] = {}
    moe: dict[str, Pass] = {}
    with one_rank(), open_dense(dense_folder) as source:
        models = (built(source, None), dense), (built(source, SPEC), moe)
        for name, recipe in PRECISIONS.items():
            for model, found in models:
                found[name] = measured(model, tokens_BS, recipe)
                print(name, found[name].losses.mean().item(), f"{found[name].seconds:.1f} s", flush=True)
            if recipe == "delayed":
                update_scales(Fp8Recipe.of(models[0][0].config), slice(0, 2))
            loss = with_interval(dense["BF16"].losses)
            said = f"{SEQUENCES} sequences of {LENGTH} tokens of held-out text; loss of the parent in BF16 {loss}."
            about = "Distances and losses are compared with the parent in BF16; times are of a forward pass."
            command = "`python -m benchmarks.fp8_step0 DENSE HELDOUT`"
            text = f"{command}: {said} {about}\n\n{tables(dense, moe)}\n"
            RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
