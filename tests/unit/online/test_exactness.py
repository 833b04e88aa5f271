"""Exact specs give the dense model's logits in real Megatron modules, and inexact specs do not.

Both models run in the same implementation, in float32, so only the upcycling differs. The error is the norm of the
logits' difference divided by the norm of the logits. Without its FFNs, the small model has an error of about one.
"""

from __future__ import annotations

from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.models.growth import inexact_because
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.trainers.equivalence import megatron_logits
from tests.models import MemorySource, build_chunks, moe_settings, sample_tokens, small_architecture
from tests.tiers import every_value


BIASES = {"qkv_bias": True, "attention_out_bias": True, "ffn_bias": True}
GELU = {"gated": False, "activation": "gelu"}
NETWORKS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "geglu": {"activation": "gelu"},
    "gelu": GELU,
    "squared_relu": {"gated": False, "activation": "squared_relu"},
    "qwen3": {"hf_class": "Qwen3ForCausalLM", "qk_norm": True},  # query and key norms are copied unchanged
    "tied": {"qkv_bias": True, "tied_embeddings": True},
}
BIASED = {"biases": BIASES, "gelu, biases": GELU | BIASES}
EXACT, VISIBLE = 2e-6, 1e-3


pytestmark = pytest.mark.usefixtures("megatron")


def _error(network: dict[str, Any], spec: UpcycleSpec) -> float:
    """Return the relative error of an upcycled model's logits."""
    arch = small_architecture(num_layers=4, **network)
    tokens = sample_tokens(arch.vocab_size)
    dense = build_chunks(arch, num_experts=None)
    moe = build_chunks(arch, **moe_settings(arch, spec))
    source = MemorySource(arch)
    load_dense_into(dense, source)
    receipt = upcycle_into(moe, source, spec)
    assert receipt.inexact_because == [*inexact_because(arch, spec)]
    padding = (256 - arch.vocab_size) * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    assert receipt.total_params == sum(parameter.numel() for parameter in moe[0].parameters()) - padding
    wanted = megatron_logits(dense[0].eval(), tokens)
    return float((megatron_logits(moe[0].eval(), tokens) - wanted).norm() / wanted.norm())


def _spec(copies: int = 4, chosen: int = 2, granularity: int = 1, **fields: Any) -> UpcycleSpec:
    """Return a spec with this many copies of the FFN; each token uses `chosen` copies."""
    fields = {"router_std": 1.0} | fields
    counts = {"num_experts": copies * granularity, "top_k": chosen * granularity, "granularity": granularity}
    return UpcycleSpec(**(counts | fields))


#: Spec fields; by default, two of four copies are chosen.
SPECS: list[dict[str, Any]] = [
    {},
    {"granularity": 2},
    {"granularity": 8},
    {"moe_layers": "every-2"},
    {"moe_layers": (2,)},
    {"router_std": 5.0},
    {"chosen": 3, "router_init": "uniform"},
    {"chosen": 3, "granularity": 3},
    {"routed_scaling_factor": 2.5},
    {"chosen": 4, "router_init": "zero", "granularity": 2},
    # With all experts chosen, softmax before and after top-k give the same weights.
    {"chosen": 4, "router_order": "softmax_topk", "granularity": 2},
    {"chosen": 4, "router_order": "softmax_topk", "routed_scaling_factor": 0.5, "output_scale": "exact"},
    # The router must be zero; otherwise the sum of the chosen experts' weights is unknown.
    {"chosen": 1, "router_order": "softmax_topk", "router_init": "zero"},
    {"chosen": 3, "router_order": "softmax_topk", "router_init": "zero", "routed_scaling_factor": 2.5},
    {"router_order": "softmax_topk", "router_std": 0.0},
    {"router_score": "sigmoid"},
    {"chosen": 3, "router_score": "sigmoid", "router_init": "uniform", "routed_scaling_factor": 2.5},
    {"chosen": 1, "router_score": "sigmoid", "granularity": 4, "router_std": 0.02},
    {"chosen": 1, "router_score": "sigmoid", "router_init": "zero", "routed_scaling_factor": 2.5},
    # These settings change nothing.
    {"method": "noise", "noise_std": 0.0},
    {"method": "drop", "drop_ratio": 0.0},
    {"output_scale": "none"},
]
#: Spec fields with shared experts, which have no biases in Megatron.
SHARED: list[dict[str, Any]] = [
    *({"granularity": parts, "shared_experts": shared} for parts, shared in ((1, 1), (2, 2), (4, 3), (8, 5), (8, 8))),
    {"granularity": 2, "shared_experts": 1, "moe_layers": "first-3-dense"},
    {"granularity": 4, "shared_experts": 2, "moe_layers": "every-2", "router_score": "sigmoid", "seed": 3}
    | {"router_std": 0.02, "routed_scaling_factor": 2.5},
]


@pytest.mark.parametrize(
    ("network", "fields"), [*every_value(NETWORKS | BIASED, SPECS), *every_value(NETWORKS, SHARED)], ids=str
)
def test_exact_specs_give_the_dense_models_logits(network: str, fields: dict[str, Any]) -> None:
    spec = _spec(**fields)
    assert spec.is_exact
    assert _error((NETWORKS | BIASED)[network], spec) <= EXACT


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_spec(method="noise", noise_std=0.05), "noise_std=0.05 changes every weight"),
        (_spec(method="drop", drop_ratio=0.25), "drop_ratio=0.25 redraws some neurons"),
        (_spec(granularity=2, top_k=3), "top_k=3 is no multiple of granularity=2"),
        (_spec(copies=6, chosen=1, granularity=2, router_init="zero"), "a zero router scores all experts equally"),
        (_spec(router_order="softmax_topk"), "only with a zero router"),
        (
            _spec(copies=8, granularity=2, router_score="sigmoid", router_std=5.0),
            "with router_std=5 two copies can have the same sigmoid score",
        ),
        (_spec(copies=3, router_score="sigmoid", router_std=1000.0), "with router_std=1e+03 float32 loses the sum"),
        (_spec(granularity=2, output_scale="none"), "output_scale=none leaves 0.5 of the dense output"),
        (_spec(router_order="softmax_topk", router_init="zero", output_scale="none"), "leaves 0.5 of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_exact_says_why_and_shows(spec: UpcycleSpec, reason: str) -> None:
    (found,) = inexact_because(small_architecture(), spec)
    assert reason in found
    assert _error({}, spec) > VISIBLE
