"""The router's gradient of all experts: against autograd of every expert, on one layer, and the same on every layout.

Real Megatron layers, dispatchers, schedules and gloo groups. Experts differ (half of their neurons are drawn anew):
the gradient of copies is zero.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.errors import SpecError
from tests.distributed.ranks import run_ranks
from tests.distributed.router_step import by_layer, take_step
from tests.models import MemorySource, build_chunks, moe_settings, sample_tokens, small_architecture
from tests.tiers import quick


ARCH = small_architecture()
SPEC = UpcycleSpec(num_experts=4, top_k=2, method="drop", router_std=0.5)
TOKENS = 24
LOSSES: dict[str, Any] = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
LOSSES["moe_z_loss_coeff"] = 0.1
KINDS: dict[str, dict[str, Any]] = {
    "topk_softmax": {},
    "softmax_topk": {"router_order": "softmax_topk"},
    "sigmoid": {"router_score": "sigmoid", "routed_scaling_factor": 2.5},
    "top-1": {"router_order": "softmax_topk", "top_k": 1},
    "8 experts": {"num_experts": 8, "top_k": 3},
    "granular, shared": {"num_experts": 8, "top_k": 4, "granularity": 2, "shared_experts": 1},
}


def _teach(chunks: list[Any], config: Any) -> int:
    from nemo_upcycle.trainers.router_gradient import let_all_experts_teach

    return let_all_experts_teach(chunks, config)


def _layer(spec: UpcycleSpec, dtype: torch.dtype, **changes: Any) -> Any:
    """Return the first layer's experts and router."""
    chunks = build_chunks(ARCH, **moe_settings(ARCH, spec) | {"moe_aux_loss_coeff": 0.0} | changes)
    upcycle_into(chunks, MemorySource(ARCH), spec)
    return chunks[0].decoder.layers[0].mlp.to(dtype).train()


def _pass(layer: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Run a layer forward and backward on the same numbers; return its output and all gradients."""
    numbers = torch.Generator().manual_seed(1)
    hidden, grad = (torch.randn(TOKENS, 2, ARCH.hidden_size, generator=numbers, dtype=dtype) for _ in range(2))
    layer.zero_grad()
    hidden.requires_grad_()
    output, _ = layer(hidden)
    output.backward(grad)
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    assert hidden.grad is not None
    return {"output": output.detach(), "hidden": hidden.grad, **grads}


def _by_autograd(layer: Any, spec: UpcycleSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Do the same with every expert computed for every token, and PyTorch's own derivatives."""
    numbers = torch.Generator().manual_seed(1)
    hidden, grad = (torch.randn(TOKENS, 2, ARCH.hidden_size, generator=numbers, dtype=dtype) for _ in range(2))
    layer.zero_grad()
    hidden.requires_grad_()
    x_TD = hidden.flatten(0, 1)
    logits_TE = x_TD @ layer.router.weight.T
    scores_TE = logits_TE.softmax(-1) if spec.router_score == "softmax" else logits_TE.sigmoid()
    chosen_TE = torch.zeros_like(scores_TE).scatter(1, scores_TE.topk(spec.top_k)[1], 1)
    mixture_TE = scores_TE / scores_TE.sum(-1, keepdim=True)  # of all experts
    probs_TE = scores_TE * chosen_TE * spec.routed_scaling_factor
    if spec.sums_to_one:
        probs_TE = probs_TE / (scores_TE * chosen_TE).sum(-1, keepdim=True)
    probs_TE = probs_TE.detach()
    scale_T1 = probs_TE.sum(-1, keepdim=True) / (mixture_TE * chosen_TE).sum(-1, keepdim=True)
    outputs = []
    for expert in layer.experts.local_experts:
        gate, up = (x_TD @ expert.linear_fc1.weight.T).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ expert.linear_fc2.weight.T)
    outputs_TED = torch.stack(outputs, dim=1)
    value_TD = torch.einsum("te,ted->td", probs_TE, outputs_TED)
    through_TD = torch.einsum("te,ted->td", mixture_TE * scale_T1.detach(), outputs_TED.detach())
    output = (value_TD + through_TD - through_TD.detach()).view_as(hidden)
    if layer.shared_experts is not None:
        output = output + layer.shared_experts(hidden)
    output.backward(grad)
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    assert hidden.grad is not None
    return {"output": output.detach(), "hidden": hidden.grad, **grads}


def _compared(fields: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a layer's numbers as Megatron has them, with the option, and by autograd."""
    spec = UpcycleSpec(**{"num_experts": 4, "top_k": 2, "method": "drop", "router_std": 0.5} | fields)
    layer = _layer(spec, dtype)
    plain, expected = _pass(layer, dtype), _by_autograd(layer, spec, dtype)
    assert _teach([layer], layer.config) == 1
    return {"plain": plain, "dense": _pass(layer, dtype), "expected": expected}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_layer_has_the_gradients_of_autograd_through_every_expert(kind: str, dtype: torch.dtype) -> None:
    (found,) = run_ranks(_compared, 1, KINDS[kind], dtype)
    plain, dense, expected = (found[name] for name in ("plain", "dense", "expected"))
    assert torch.equal(dense["output"], plain["output"])
    for name, gradient in dense.items():
        # Megatron's router has its softmax in float32 also where all else is in float64.
        assert _off(gradient, expected[name]) < 1e-6, name
        if name.startswith("experts."):
            assert torch.equal(gradient, plain[name])
    assert _off(plain["router.weight"], expected["router.weight"]) > 0.03


def _off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def _with_losses() -> dict[str, torch.Tensor]:
    """Return the routers' gradients with and without auxiliary losses, as Megatron has them and with the option."""
    found = {}
    for name, losses in (("with", LOSSES), ("without", {})):
        layer = _layer(SPEC, torch.float64, **losses)
        found[f"plain {name}"] = _pass(layer, torch.float64)["router.weight"]
        _teach([layer], layer.config)
        found[f"dense {name}"] = _pass(layer, torch.float64)["router.weight"]
    return found


def test_auxiliary_losses_add_what_they_add_to_a_plain_gradient() -> None:
    (found,) = run_ranks(_with_losses, 1)
    added = {kind: found[f"{kind} with"] - found[f"{kind} without"] for kind in ("plain", "dense")}
    assert added["plain"].norm() > 0.01 * found["plain without"].norm()
    assert _off(added["dense"], added["plain"]) < 1e-6


def _step(layout: dict[str, int], changes: dict[str, Any], dense: bool) -> dict[str, Any]:
    return take_step(layout, changes, SPEC, prepare=_teach if dense else None, weight=1.0)


WHOLE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXPERTS = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "ep2": (2, {"ep": 2}, {}),
    "tp2": (2, {"tp": 2, "etp": 2}, {}),
    "tp2, ep2": (2, {"tp": 2, "ep": 2}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "tp2, ep2, etp2": (4, {"tp": 2, "ep": 2, "etp": 2}, {}),
    "ep2, recomputed": (2, {"ep": 2}, WHOLE),
    "ep2, experts recomputed": (2, {"ep": 2}, EXPERTS),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One rank, as Megatron has it and with the option."""
    found = {}
    for name, dense in (("plain", False), ("dense", True)):
        (found[name],) = run_ranks(_step, 1, {}, {}, dense)
    return found


@pytest.mark.parametrize("layout", quick(LAYOUTS, "ep2", "tp2", "ep2, recomputed"))
def test_every_layout_gives_a_router_the_gradient_of_one_rank(alone: dict[str, Any], layout: str) -> None:
    ranks, sizes, changes = LAYOUTS[layout]
    plain, dense = (by_layer([alone[kind]], "gradients") for kind in ("plain", "dense"))
    got = by_layer(run_ranks(_step, ranks, sizes, changes, True), "gradients")
    for layer in range(len(dense)):
        assert _off(got[layer], dense[layer]) < 1e-5
        assert _off(plain[layer], dense[layer]) > 0.1
    assert alone["dense"]["losses"] == alone["plain"]["losses"]


def _with_capacity(pad: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Return what a layer that drops tokens gives, and what one that drops none does."""
    found = {}
    for name, factor in (("plain", 0.6), ("dropping", 0.6), ("whole", None)):
        capacity = {"moe_expert_capacity_factor": factor, "moe_pad_expert_input_to_capacity": pad and bool(factor)}
        layer = _layer(SPEC, torch.float64, **capacity)
        if name != "plain":
            _teach([layer], layer.config)
        found[name] = _pass(layer, torch.float64)
    return found


@pytest.mark.parametrize("pad", [False, True])
def test_a_dropped_token_teaches_the_router_as_if_it_had_been_kept(pad: bool) -> None:
    (found,) = run_ranks(_with_capacity, 1, pad)
    assert torch.equal(found["dropping"]["output"], found["plain"]["output"])
    assert not torch.equal(found["dropping"]["output"], found["whole"]["output"])
    assert _off(found["dropping"]["router.weight"], found["whole"]["router.weight"]) < 1e-6


def _scales(dense: bool) -> list[list[float]]:
    """Return the numbers that delayed scaling has seen of inputs and weights, after a step in emulated FP8."""
    from nemo_upcycle.cpu.fp8_recipe import INPUT, WEIGHT

    fp8 = {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max"}
    chunks = build_chunks(ARCH, **moe_settings(ARCH, SPEC) | fp8)
    upcycle_into(chunks, MemorySource(ARCH), SPEC)
    if dense:
        _teach(chunks, chunks[0].config)
    tokens = sample_tokens(ARCH.vocab_size, 4, 8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    chunks[0].set_is_first_microbatch()
    chunks[0](tokens, torch.arange(8).expand_as(tokens), mask, labels=tokens).mean().backward()
    states = [module.fp8_scales for module in chunks[0].modules() if getattr(module, "fp8_scales", None)]
    return [[*state.scale[[INPUT, WEIGHT]].tolist(), *state.history[:, [INPUT, WEIGHT]].flatten()] for state in states]


def test_delayed_scaling_sees_nothing_of_the_experts_that_compute_once_more() -> None:
    (plain,), (dense,) = (run_ranks(_scales, 1, option) for option in (False, True))
    assert len(plain) > 4 * 2 * SPEC.num_experts / 2
    assert plain == dense


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"moe_token_dispatcher_type": "allgather"}, "moe_token_dispatcher_type"),
        ({"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type"),
        ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm"),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": "full"}, "cuda_graph_impl"),
        ({"moe_router_topk": 4}, "moe_router_topk"),
        ({"moe_router_topk": 1, "moe_router_score_function": "sigmoid"}, "moe_router_score_function"),
        ({"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input"),
        ({"num_moe_experts": None}, "num_moe_experts"),
        ({"fp8_param": True}, "fp8_param"),
    ],
)
def test_what_stands_in_the_way_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    from types import SimpleNamespace

    from nemo_upcycle.trainers.router_gradient import check_router_gradient

    fields = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall"}
    check_router_gradient(SimpleNamespace(**fields))
    with pytest.raises(SpecError) as raised:
        check_router_gradient(SimpleNamespace(**fields | changes), "model.", "optim.")
    assert raised.value.field == f"model.{field}"
    assert "optim.dense_router_gradient=False" in str(raised.value)
