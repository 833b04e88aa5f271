"""Compare upcycling with Megatron-Core's upcycling: exactness at step 0, in float32, on one rank on a CPU.

    python -m benchmarks.exactness            # writes benchmarks/results/exactness.md

Both methods fill the same Megatron MoE model from the same random dense parent. The parent's weights have std 0.1, so
that activations are of order one, as in trained models. The reference is the parent in Megatron. The error is the norm
of the logits' difference divided by the norm of the reference's logits. Unless a case says otherwise, the router is
random with std 1, so that a wrong combine weight changes the logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import chosen
from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.trainers.equivalence import megatron_logits, one_rank
from tests.models import MemorySource, build_chunks, moe_settings, sample_tokens, small_architecture


RESULTS = Path(__file__).parent / "results" / "exactness.md"
GEGLU = {"activation": "gelu"}
GELU = {"activation": "gelu", "gated": False}
SQUARED_RELU = {"activation": "squared_relu", "gated": False}
BIASES = {"qkv_bias": True, "attention_out_bias": True, "ffn_bias": True}
ST = {"router_order": "softmax_topk"}
SIGMOID = {"router_score": "sigmoid"}


def _spec(experts: int, top_k: int, granularity: int = 1, **fields: Any) -> UpcycleSpec:
    fields = {"router_std": 1.0} | fields
    return UpcycleSpec(num_experts=experts, top_k=top_k, granularity=granularity, **fields)


#: Cases: name, settings of the dense network, and spec.
CASES: list[tuple[str, dict[str, Any], UpcycleSpec]] = [
    ("SwiGLU G1, 8 experts top-2", {}, _spec(8, 2)),
    ("SwiGLU G2, 8 experts top-4", {}, _spec(8, 4, 2)),
    ("SwiGLU G4, 16 experts top-8", {}, _spec(16, 8, 4)),
    ("SwiGLU G8, 64 experts top-8", {}, _spec(64, 8, 8)),
    ("GEGLU G1, 8 experts top-2", GEGLU, _spec(8, 2)),
    ("GEGLU G2, 8 experts top-4", GEGLU, _spec(8, 4, 2)),
    ("GELU without gate G2, 8 experts top-4", GELU, _spec(8, 4, 2)),
    ("squared ReLU without gate G2, 8 experts top-4", SQUARED_RELU, _spec(8, 4, 2)),
    ("GELU with biases G1, 8 experts top-2", GELU | BIASES, _spec(8, 2)),
    ("GELU with biases G2, 8 experts top-4", GELU | BIASES, _spec(8, 4, 2)),
    ("SwiGLU with biases G2, 8 experts top-4", BIASES, _spec(8, 4, 2)),
    ("SwiGLU G1 and a shared expert", {}, _spec(8, 2, shared_experts=1)),
    ("SwiGLU G4 and 2 shared experts", {}, _spec(16, 8, 4, shared_experts=2)),
    ("SwiGLU G2, every second layer dense", {}, _spec(8, 4, 2, moe_layers="every-2")),
    ("SwiGLU G1, softmax before top-k, zero router", {}, _spec(8, 2, router_init="zero", **ST)),
    ("SwiGLU G1, softmax before top-k, router std 1e-4", {}, _spec(8, 2, router_std=1e-4, **ST)),
    ("SwiGLU G1, softmax before top-k, router std 0.02", {}, _spec(8, 2, router_std=0.02, **ST)),
    ("SwiGLU G2, softmax before top-k of all 8 experts", {}, _spec(8, 8, 2, **ST)),
    (
        "SwiGLU G2, sigmoid scores, factor 2.5",
        {},
        _spec(8, 4, 2, router_std=0.02, routed_scaling_factor=2.5, **SIGMOID),
    ),
    ("SwiGLU G1, sigmoid, top-1, zero router", {}, _spec(8, 1, router_init="zero", **SIGMOID)),
    ("SwiGLU G4, 32 experts top-6", {}, _spec(32, 6, 4)),
    ("SwiGLU G2, zero router", {}, _spec(12, 2, 2, router_init="zero")),
    ("SwiGLU G2, output not scaled", {}, _spec(8, 4, 2, output_scale="none")),
    ("SwiGLU G1, noise 0.01", {}, _spec(8, 2, method="noise")),
    ("SwiGLU G1, half of the neurons dropped", {}, _spec(8, 2, method="drop")),
]


def _dense_logits(arch: Any, source: MemorySource, *, networks: bool = True) -> tuple[list[Any], torch.Tensor]:
    chunks = build_chunks(arch, num_experts=None)
    load_dense_into(chunks, source)
    if not networks:
        for layer in chunks[0].decoder.layers:
            layer.mlp.linear_fc2.weight.data.zero_()
    return chunks, megatron_logits(chunks[0].eval(), sample_tokens(arch.vocab_size))


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def ours(moe: list[Any], dense: list[Any], source: MemorySource, spec: UpcycleSpec) -> None:
    """Fill the MoE model with `upcycle_into`."""
    upcycle_into(moe, source, spec)


def megatron(moe: list[Any], dense: list[Any], source: MemorySource, spec: UpcycleSpec) -> None:
    """Fill the MoE model with Megatron-Core's `upcycle_state_dict`, and the router with random numbers."""
    from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict

    router_std = 0.0 if spec.router_init == "zero" else spec.router_std
    for name, parameter in moe[0].named_parameters():
        if name.endswith("router.weight"):
            parameter.data.normal_(0, router_std, generator=torch.Generator().manual_seed(1))
        elif name.endswith("router.bias"):
            parameter.data.zero_()  # Megatron-Core leaves this memory uninitialised
    moe[0].load_state_dict(upcycle_state_dict(moe, dense)["model"], strict=True)


def error(fill: Callable[..., None], network: dict[str, Any], spec: UpcycleSpec) -> float | str:
    """Return the relative error of the logits, or the name of the raised exception."""
    arch = small_architecture(**network)
    source = MemorySource(arch)
    dense, wanted = _dense_logits(arch, source)
    torch.manual_seed(0)
    moe = build_chunks(arch, **moe_settings(arch, spec), init_method_std=0.1)  # std where `fill` sets no weight
    try:
        fill(moe, dense, source, spec)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as raised:
        return f"refused: {type(raised).__name__}"
    return _relative(megatron_logits(moe[0].eval(), sample_tokens(arch.vocab_size)), wanted)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}" if value < 1e-2 else f"{value:.2f}"


def table() -> str:
    """Return the results as Markdown."""
    rows = ["| case | ours | Megatron-Core | what ours says |", "|---|---:|---:|---|"]
    for name, network, spec in CASES:
        told = "exact" if spec.is_exact else "; ".join(spec.inexact_because)
        competitor = _shown(error(megatron, network, spec)) if spec.method == "copy" else "has no such method"
        rows.append(f"| {name} | {_shown(error(ours, network, spec))} | {competitor} | {told} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Measure, and print and write the table."""
    chosen(__doc__, sys.argv[1:])
    from importlib.metadata import version

    with one_rank():
        arch = small_architecture()
        source = MemorySource(arch)
        without = _relative(_dense_logits(arch, source, networks=False)[1], _dense_logits(arch, source)[1])
        text = (
            "`python -m benchmarks.exactness`: relative error of the logits at step 0, float32, "
            f"megatron-core {version('megatron-core')}, torch {version('torch')}. "
            f"A model whose feed-forward networks are deleted errs by {without:.2f}.\n\n{table()}"
        )
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
