"""Copies of the dense feed-forward network: the same bits."""

from __future__ import annotations

import pytest
import torch

from nemo_upcycle.init.experts import fill_copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_copies_carry_the_same_bits(dtype: torch.dtype) -> None:
    dense_FD = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    dense_FD[0, :3] = torch.tensor([float("-0.0"), torch.finfo(dtype).tiny, torch.finfo(dtype).max])
    experts = [dense_FD.clone(), *(torch.full_like(dense_FD, float("nan")) for _ in range(3))]
    places = [expert.data_ptr() for expert in experts]
    fill_copies(experts)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    for expert in experts:
        assert torch.equal(expert.view(bits), dense_FD.view(bits))
    assert [expert.data_ptr() for expert in experts] == places


def test_a_single_expert_stays_what_it_is() -> None:
    experts = [torch.arange(6.0).view(2, 3)]
    fill_copies(experts)
    assert torch.equal(experts[0], torch.arange(6.0).view(2, 3))


def test_copies_do_not_share_memory() -> None:
    experts = [torch.ones(4), torch.zeros(4)]
    fill_copies(experts)
    experts[1][0] = 5.0
    assert float(experts[0][0]) == 1.0
