"""Settings that shapes do not show are refused if they change the function, and named if they round the result."""

from __future__ import annotations

import pytest
import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.online.upcycle import load_dense_into
from tests.models import MemorySource, build_chunks, moe_settings, scale_embedding, small_architecture


pytestmark = pytest.mark.usefixtures("megatron")
SPEC = UpcycleSpec(num_experts=4, top_k=2)
GRANULAR = UpcycleSpec(num_experts=64, top_k=8, granularity=8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"softmax_scale": 1.0}, "softmax_scale is 1.0; expected None or 0.25"),
        ({"no_rope_freq": 2}, "no_rope_freq is "),
        ({"model": {"rotary_percent": 0.5}}, "rotary_base and RoPE scaling is "),
        ({"model": {"seq_len_interpolation_factor": 4.0}}, "seq_len_interpolation_factor is 4.0; expected None"),
        ({"model": {"position_embedding_type": "none"}}, "position_embedding_type is none; expected rope"),
    ],
)
def test_refuses_settings_that_change_the_function_before_filling(changes: dict, words: str) -> None:
    arch = small_architecture()
    (chunk,) = build_chunks(arch, num_experts=4, **changes)
    before = [parameter.clone() for parameter in chunk.parameters()]
    with pytest.raises(UpcycleError, match=rf"{words}.*\. (Set|Use|Make) "):
        upcycle_into([chunk], MemorySource(arch), SPEC)
    assert all(torch.equal(parameter, was) for parameter, was in zip(chunk.parameters(), before, strict=True))
    with pytest.raises(UpcycleError, match=words):
        load_dense_into(build_chunks(arch, num_experts=None, **changes), MemorySource(arch))


def test_what_is_usual_may_be_spelled_out() -> None:
    settings = {"model": {"seq_len_interpolation_factor": 1.0}, "softmax_scale": 0.25}
    chunks = build_chunks(small_architecture(), num_experts=4, **settings)
    assert upcycle_into(chunks, MemorySource(small_architecture()), SPEC).exact


@pytest.mark.parametrize(
    ("kind", "factor", "exact"),
    [("", None, True), ("", 2.0, True), ("", 1.5, False), ("rank_", 1.0, True), ("rank_", 0.5, False)],
)
def test_a_capacity_below_every_token_is_told(kind: str, factor: float | None, exact: bool) -> None:
    """With four experts and top-2, an expert has room for all tokens if the factor is at least 4 / 2."""
    (chunk,), name = build_chunks(small_architecture(), num_experts=4), f"moe_expert_{kind}capacity_factor"
    setattr(chunk.config, name, factor)
    receipt = upcycle_into([chunk], MemorySource(small_architecture()), SPEC)
    assert receipt.exact is exact
    assert exact or receipt.inexact_because[0].startswith(f"{name}={factor} drops the tokens")


def test_gemmas_scaled_embedding_is_asked_for() -> None:
    gemma = {"hf_class": "GemmaForCausalLM", "activation": "gelu_tanh", "scaled_embedding": True}
    chunks = build_chunks(small_architecture(), num_experts=4, activation_func=torch.nn.GELU("tanh"))
    source = MemorySource(small_architecture(**gemma))
    (reason,) = upcycle_into(chunks, source, SPEC).inexact_because
    assert reason.startswith("the model does not multiply its embedding by sqrt(hidden_size)")
    scale_embedding(chunks[0])
    assert upcycle_into(chunks, source, SPEC).exact


def test_granular_models_need_routers_in_float32() -> None:
    arch, half = small_architecture(), {"bf16": True, "params_dtype": torch.bfloat16}
    settings = moe_settings(arch, GRANULAR)
    for others in ({"moe_router_dtype": None}, half | {"moe_router_dtype": "fp64"}, half):
        upcycle_into(build_chunks(arch, **(settings | others)), MemorySource(arch), GRANULAR)
    with pytest.raises(SpecError, match=r"moe_router_dtype is None; expected fp32 or fp64 .*Set it to fp32"):
        upcycle_into(
            build_chunks(arch, **(settings | half | {"moe_router_dtype": None})), MemorySource(arch), GRANULAR
        )


def test_a_spec_refuses_the_single_expert_that_megatron_refuses() -> None:
    with pytest.raises(ValueError, match="moe-router-pre-softmax when topk is 1"):
        build_chunks(small_architecture(), num_experts=4, top_k=1)
    allowed = UpcycleSpec(num_experts=4, top_k=1, router_order="softmax_topk", router_init="zero")
    chunks = build_chunks(small_architecture(), **moe_settings(small_architecture(), allowed))
    assert upcycle_into(chunks, MemorySource(small_architecture()), allowed).exact
