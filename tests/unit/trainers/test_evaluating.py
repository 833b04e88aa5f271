"""A model drops no token while it is evaluated during training, and is unchanged afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.evaluation.megatron.forward import evaluating
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.trainers.equivalence import megatron_logits
from tests.models import MemorySource, build_chunks, sample_tokens, small_architecture


pytestmark = pytest.mark.usefixtures("megatron")
SPEC = UpcycleSpec(num_experts=4, top_k=2, router_std=1.0)


def _logits(chunks: list[Any]) -> torch.Tensor:
    return megatron_logits(chunks[0], sample_tokens(250))


@pytest.mark.parametrize("padded", [False, True], ids=["dropping", "padded"])
def test_no_token_is_dropped_while_a_model_is_evaluated(padded: bool) -> None:
    source = MemorySource(small_architecture())
    dense = build_chunks(small_architecture(), num_experts=None)
    load_dense_into(dense, source)
    capacity = {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": padded}
    chunks = build_chunks(small_architecture(), num_experts=4, **capacity)
    upcycle_into(chunks, source, SPEC)
    wanted, dropping = _logits(dense), _logits(chunks)
    assert float((dropping - wanted).norm() / wanted.norm()) > 1e-2
    with evaluating(chunks):
        found = _logits(chunks)
        assert not chunks[0].training
    assert float((found - wanted).norm() / wanted.norm()) <= 2e-6
    assert chunks[0].training
    assert chunks[0].config.moe_expert_capacity_factor == 0.5
    assert torch.equal(_logits(chunks), dropping)
