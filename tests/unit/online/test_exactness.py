"""What the specs promise, computed by real Megatron modules: exact ones give the dense model's logits, others do not.

Both models run in the same implementation, in float32: what differs is the upcycling. The error is the norm of the
difference of the logits over the norm of the logits; without its networks the small model errs by about one.
"""

from __future__ import annotations

from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.models.growth import inexact_because
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.trainers.equivalence import megatron_logits
from tests.models import MemorySource, build_chunks, moe_settings, sample_tokens, small_architecture
from tests.tiers import every_pair, every_value


NETWORKS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "geglu": {"activation": "gelu"},
    "gelu": {"gated": False, "activation": "gelu"},
    "squared_relu": {"gated": False, "activation": "squared_relu"},
}
BIASES = {"qkv_bias": True, "attention_out_bias": True, "ffn_bias": True}
QWEN3 = {"hf_class": "Qwen3ForCausalLM", "qk_norm": True}
EXACT, VISIBLE = 2e-6, 1e-3


pytestmark = pytest.mark.usefixtures("megatron")


def _error(network: dict[str, Any], spec: UpcycleSpec, **changes: Any) -> float:
    """Return the relative error of an upcycled model's logits."""
    arch = small_architecture(**network)
    tokens = sample_tokens(arch.vocab_size)
    dense = build_chunks(arch, num_experts=None)
    moe = build_chunks(arch, **(moe_settings(arch, spec) | changes))
    source = MemorySource(arch)
    load_dense_into(dense, source)
    receipt = upcycle_into(moe, source, spec)
    assert receipt.inexact_because == [*inexact_because(arch, spec)]
    padding = (256 - arch.vocab_size) * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    assert receipt.total_params == sum(parameter.numel() for parameter in moe[0].parameters()) - padding
    wanted = megatron_logits(dense[0].eval(), tokens)
    return float((megatron_logits(moe[0].eval(), tokens) - wanted).norm() / wanted.norm())


def _name(value: Any) -> str:
    return "biases" if value is BIASES else str(value)


def _spec(copies: int = 4, chosen: int = 2, granularity: int = 1, **fields: Any) -> UpcycleSpec:
    """Return a spec of so many copies of the network, of which a token passes through so many."""
    fields = {"router_std": 1.0} | fields
    counts = {"num_experts": copies * granularity, "top_k": chosen * granularity, "granularity": granularity}
    return UpcycleSpec(**(counts | fields))


@pytest.mark.parametrize(
    ("network", "biases", "granularity"), every_pair(NETWORKS, ({}, BIASES), (1, 2, 4, 8)), ids=_name
)
def test_granularity_is_exact_for_every_activation(network: str, biases: dict, granularity: int) -> None:
    spec = _spec(granularity=granularity)
    assert spec.is_exact
    assert _error(NETWORKS[network] | biases, spec) <= EXACT


@pytest.mark.parametrize(
    ("network", "counts"), every_value(NETWORKS, ((1, 1), (2, 1), (2, 2), (4, 3), (8, 5), (8, 8))), ids=str
)
def test_shared_experts_are_exact(network: str, counts: tuple[int, int]) -> None:
    granularity, shared = counts
    spec = _spec(granularity=granularity, shared_experts=shared)
    assert spec.is_exact
    assert _error(NETWORKS[network], spec) <= EXACT


@pytest.mark.parametrize(
    ("layers", "fields"),
    every_value(
        ("every-2", "first-1-dense", "first-3-dense", (0, 3), (2,)), ({}, {"granularity": 2, "shared_experts": 1})
    ),
    ids=str,
)
def test_dense_layers_between_are_exact(fields: dict, layers: Any) -> None:
    spec = _spec(moe_layers=layers, **fields)
    assert spec.is_exact
    assert _error({"num_layers": 4}, spec) <= EXACT


#: Of so many chosen copies, and what else the spec says.
ROUTERS: list[tuple[int, dict[str, Any]]] = [
    (2, {"router_std": 0.02}),
    (2, {"router_std": 5.0}),
    (3, {"router_init": "uniform"}),
    (1, {"granularity": 2}),
    (3, {"granularity": 3}),
    (2, {"routed_scaling_factor": 2.5}),
    (2, {"router_init": "zero"}),
    (4, {"router_init": "zero", "granularity": 2}),
    # all experts chosen: softmax before or after top-k is the same
    (4, {"router_order": "softmax_topk", "granularity": 2}),
    (4, {"router_order": "softmax_topk", "routed_scaling_factor": 0.5, "output_scale": "exact"}),
    # the router's weights must be zero, else the sum of the chosen experts' weights is not known
    (1, {"router_order": "softmax_topk", "router_init": "zero"}),
    (3, {"router_order": "softmax_topk", "router_init": "zero", "routed_scaling_factor": 2.5}),
    (2, {"router_order": "softmax_topk", "router_std": 0.0}),
    (2, {"router_score": "sigmoid"}),
    (3, {"router_score": "sigmoid", "router_init": "uniform", "routed_scaling_factor": 2.5}),
    (1, {"router_score": "sigmoid", "granularity": 4, "router_std": 0.02}),
    (1, {"router_score": "sigmoid", "router_init": "zero"}),
    (1, {"router_score": "sigmoid", "router_init": "zero", "routed_scaling_factor": 2.5}),
]


@pytest.mark.parametrize(("router", "biases"), every_value(ROUTERS, ({}, BIASES)), ids=_name)
def test_routers_are_exact_where_the_weights_sum_is_known(router: tuple[int, dict], biases: dict) -> None:
    chosen, fields = router
    spec = _spec(chosen=chosen, **fields)
    assert spec.is_exact
    assert _error(biases, spec) <= EXACT


EVERYTHING: dict[str, Any] = {
    **{"granularity": 4, "shared_experts": 2, "moe_layers": "every-2", "router_score": "sigmoid", "seed": 3},
    **{"router_std": 0.02, "routed_scaling_factor": 2.5},
}


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        (QWEN3, {}),  # norms of query and key stay as they are
        (QWEN3, {"granularity": 4, "shared_experts": 2}),
        (QWEN3, {"moe_layers": "every-2"}),
        ({"num_layers": 4, "qkv_bias": True, "tied_embeddings": True}, EVERYTHING),
        ({}, {"method": "noise", "noise_std": 0.0}),  # changes nothing
        ({}, {"method": "drop", "drop_ratio": 0.0}),
        ({}, {"output_scale": "none"}),
    ],
)
def test_norms_everything_together_and_what_changes_nothing_are_exact(
    network: dict[str, Any], fields: dict[str, Any]
) -> None:
    assert _spec(**fields).is_exact
    assert _error(network, _spec(**fields)) <= EXACT


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_spec(method="noise", noise_std=0.05), "noise_std=0.05 changes every weight"),
        (_spec(method="drop", drop_ratio=0.25), "drop_ratio=0.25 draws neurons anew"),
        (
            UpcycleSpec(num_experts=8, top_k=3, granularity=2, router_std=1.0),
            "top_k=3 is no multiple of granularity=2",
        ),
        (_spec(copies=6, chosen=1, granularity=2, router_init="zero"), "a zero router ties all experts"),
        (_spec(router_order="softmax_topk"), "only with a zero router"),
        (_spec(chosen=1, router_score="sigmoid"), "only with a zero router"),
        (
            _spec(copies=8, granularity=2, router_score="sigmoid", router_std=5.0),
            "with router_std=5 two copies can have the same sigmoid score",
        ),
        (_spec(copies=3, router_score="sigmoid", router_std=1000.0), "with router_std=1e+03 float32 loses the sum"),
        (_spec(granularity=2, output_scale="none"), "output_scale=none leaves 0.5 of the dense output"),
        (_spec(routed_scaling_factor=2.5, output_scale="none"), "output_scale=none leaves 2.5 of the dense output"),
        (_spec(router_order="softmax_topk", router_init="zero", output_scale="none"), "leaves 0.5 of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_exact_says_why_and_shows(spec: UpcycleSpec, reason: str) -> None:
    (found,) = inexact_because(small_architecture(), spec)
    assert reason in found
    assert _error({}, spec) > VISIBLE
