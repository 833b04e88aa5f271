"""Filling Megatron models in place: a refusal leaves every parameter unchanged, and a filled model is exact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import open_dense, upcycle_into
from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.models.activation import activation_of
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.trainers.equivalence import megatron_logits
from tests.folders import SPEC, change_weights
from tests.models import (
    MemorySource,
    build_chunks,
    hugging_face_logits,
    sample_tokens,
    small_architecture,
    weights_of,
    write_llama,
    write_mistral,
)


pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A dense folder that a test may change."""
    return write_llama(tmp_path / "copy", layers=2)


@contextmanager
def _refuses(chunks: list[Any], subject: str, got: object = None) -> Iterator[None]:
    """Expect an error with this subject and value, and unchanged parameters."""
    before = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    with pytest.raises(UpcycleError) as caught:
        yield
    assert subject in caught.value.subject
    assert got is None or caught.value.got == got
    after = [parameter for chunk in chunks for parameter in chunk.parameters()]
    # Compare bytes: memory that Megatron does not initialise may hold NaN, which is unequal to itself.
    pairs = zip(before, after, strict=True)
    assert all(torch.equal(old.view(torch.uint8), new.detach().view(torch.uint8)) for old, new in pairs)


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


GELU = torch.nn.functional.gelu
#: Changes to the spec, to the model and to the parent, then the subject and the value of the error.
DISAGREEING: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, object]] = [
    ({"num_experts": 8}, {}, {}, "model.config.num_moe_experts", 4),
    ({"top_k": 3}, {}, {}, "model.config.moe_router_topk", 2),
    ({"router_order": "softmax_topk"}, {}, {}, "model.config.moe_router_pre_softmax", False),
    ({}, {"moe_router_score_function": "sigmoid"}, {}, "model.config.moe_router_score_function", "sigmoid"),
    ({}, {"moe_router_topk_scaling_factor": 2.5}, {}, "model.config.moe_router_topk_scaling_factor", 2.5),
    ({"moe_layers": "every-2"}, {}, {}, "model.config.moe_layer_freq", 1),
    ({}, {"moe_router_load_balancing_type": "sinkhorn"}, {}, "moe_router_load_balancing_type", "sinkhorn"),
    ({}, {}, {"ffn_size": 128}, "model.config.ffn_hidden_size", 96),
    ({}, {}, {"head_dim": 32}, "model.config.kv_channels", 16),
    ({}, {}, {"norm_eps": 1e-6}, "model.config.layernorm_epsilon", 1e-5),
    ({}, {}, {"rope_theta": 1e5}, "RoPE scaling", None),
    ({}, {}, {"vocab_size": 300}, "shape of embedding.word_embeddings.weight", [256, 64]),
    ({}, {"activation_func": GELU}, {"activation": "gelu_tanh"}, "model.config.activation_func", "gelu"),
    ({}, {"activation_func": _tanh_gelu}, {"activation": "gelu"}, "model.config.activation_func", "gelu_tanh"),
    ({}, {"add_bias_linear": True}, {}, "Model parameters have no source", None),
]


@pytest.mark.parametrize(("spec", "model", "parent", "subject", "got"), DISAGREEING)
def test_what_does_not_agree_is_refused(spec: dict, model: dict, parent: dict, subject: str, got: object) -> None:
    chunks = build_chunks(small_architecture(), **{"num_experts": 4, "moe_aux_loss_coeff": 0.0} | model)
    with _refuses(chunks, subject, got):
        upcycle_into(chunks, MemorySource(small_architecture(**parent)), replace(SPEC, **spec))


@pytest.mark.parametrize(
    ("experts", "parent", "subject"),
    [
        (4, {}, "num_moe_experts"),
        (None, {"ffn_size": 128}, "ffn_hidden_size"),
        (None, {"qkv_bias": True}, "The model lacks parameters"),
    ],
)
def test_a_dense_model_is_checked_likewise(experts: int | None, parent: dict, subject: str) -> None:
    chunks = build_chunks(small_architecture(), num_experts=experts)
    with _refuses(chunks, subject):
        load_dense_into(chunks, MemorySource(small_architecture(**parent)))


def test_accepts_an_equal_activation_with_another_name() -> None:
    chunks = build_chunks(small_architecture(), num_experts=4, activation_func=_tanh_gelu)
    assert upcycle_into(chunks, MemorySource(small_architecture(activation="gelu_tanh")), SPEC).exact


def test_megatrons_and_nemos_own_activation_functions_are_known() -> None:
    from megatron.core import activations as megatron

    nemo = pytest.importorskip("nemo.collections.llm.fn.activation")
    assert activation_of(nemo.openai_gelu) == activation_of(megatron.fast_gelu) == "gelu_tanh"
    assert activation_of(nemo.squared_relu) == activation_of(megatron.squared_relu) == "squared_relu"
    assert activation_of(nemo.quick_gelu) == activation_of(megatron.quick_gelu) == "quick_gelu"
    x = torch.linspace(-6, 6, 121)
    assert torch.allclose(nemo.openai_gelu(x), torch.nn.functional.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "exact"),
    [({"window_size": (7, 0)}, True), ({}, False), ({"window_size": (8, 0)}, False)],
    ids=["the same", "none", "one token more, as NeMo imports it"],
)
def test_a_sliding_window_is_exact_in_a_model_with_it(tmp_path: Path, changes: dict, exact: bool) -> None:
    folder = write_mistral(tmp_path / "dense", window=8, layers=2)
    chunks = build_chunks(folder, num_experts=4, **changes)
    with open_dense(folder) as source:
        receipt = upcycle_into(chunks, source, SPEC)
    assert receipt.exact is exact
    assert exact or "attention; (7, 0) in every layer would be equal" in receipt.inexact_because[0]
    assert (_difference(folder, _logits(chunks)) <= 1e-5) is exact


@pytest.mark.parametrize(
    ("parent", "changes", "exact"),
    [
        ({"sliding_window": 128}, {}, True),  # no sequence of this model is longer than 128 tokens
        ({"sliding_window": 16}, {"window_size": (15, 0), "window_attn_skip_freq": 2}, False),
        ({"sliding_window": None}, {"window_size": (15, 0)}, False),
        ({"sliding_window": None}, {"window_size": (-1, 0)}, True),
    ],
)
def test_a_window_counts_where_a_sequence_is_longer(parent: dict, changes: dict, exact: bool) -> None:
    chunks = build_chunks(small_architecture(), num_experts=4, **changes)
    assert upcycle_into(chunks, MemorySource(small_architecture(**parent)), SPEC).exact is exact


def test_weights_that_are_not_what_config_json_says_are_refused(copy: Path) -> None:
    chunks = build_chunks(copy, num_experts=4)
    change_weights(copy, {"model.layers.1.mlp.up_proj.weight": None})
    lost = "lacks tensors: model.layers.1.mlp.up_proj.weight"
    with open_dense(copy) as source, _refuses(chunks, str(copy), lost):
        upcycle_into(chunks, source, SPEC)


def test_what_is_no_gpt_model_is_refused(dense: Path) -> None:
    with open_dense(dense) as source, pytest.raises(SpecError, match="Model chunk is Linear"):
        upcycle_into([torch.nn.Linear(2, 2)], source, SPEC)


def _logits(chunks: list[Any], vocab_size: int = 250) -> torch.Tensor:
    return megatron_logits(chunks[0].eval(), sample_tokens(vocab_size))[..., :vocab_size]


def _moe_logits(folder: Path) -> torch.Tensor:
    chunks = build_chunks(folder, num_experts=4)
    with open_dense(folder) as source:
        upcycle_into(chunks, source, SPEC)
    return _logits(chunks)


def _difference(folder: Path, logits: torch.Tensor) -> float:
    parent = hugging_face_logits(folder, sample_tokens(250))
    assert parent.abs().max() > 1.0  # large enough for a difference to show
    return float((logits - parent).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_parent_fills_a_float32_model(copy: Path, dtype: torch.dtype) -> None:
    change_weights(copy, {name: tensor.to(dtype) for name, tensor in weights_of(copy).items()})
    assert _difference(copy, _moe_logits(copy)) <= 1e-5


def test_stored_rotary_frequencies_are_no_obstacle(copy: Path) -> None:
    expected = _moe_logits(copy)
    change_weights(copy, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(_moe_logits(copy), expected)


def test_the_receipt_names_every_parameter_and_its_source(dense: Path) -> None:
    chunks = build_chunks(dense, num_experts=4)
    seen: list[tuple[str, int]] = []
    with open_dense(dense) as source:
        receipt = upcycle_into(chunks, source, SPEC, lambda name, written_bytes: seen.append((name, written_bytes)))
    parameters = sum(parameter.numel() for parameter in chunks[0].parameters())
    padding = 2 * (256 - 250) * 64
    assert receipt.total_params == parameters - padding
    assert receipt.active_params == receipt.total_params - 2 * 2 * 3 * 96 * 64
    assert receipt.bytes_written == parameters * 4 == sum(written_bytes for _, written_bytes in seen)
    assert {record.name for record in receipt.parameters} == {name for name, _ in chunks[0].named_parameters()}
    assert {name for name, _ in seen} < {record.name for record in receipt.parameters}
    by_name = {record.name: record for record in receipt.parameters}
    fc2 = by_name["decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight"]
    assert fc2.sources == ("model.layers.1.mlp.down_proj.weight[0:64, 0:96]",)
    assert fc2.made_by == "copied"
    assert by_name["decoder.layers.0.mlp.router.weight"].made_by == "router_init=normal, std=0.02, seed=1234"
    assert json.loads(json.dumps(receipt.to_dict()))["spec"] == SPEC.to_dict()
