"""The mapping table: pieces tile every shard and every source exactly once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.mapping import find_mapping, mapping_of
from nemo_upcycle.models.mapping_table import Sharding
from nemo_upcycle.models.sharding import Shard, hf_shape, shard_shape, source_slices
from tests.models import small_architecture


def _arch(**changes: object) -> Architecture:
    sizes = {"hidden_size": 12, "ffn_size": 16, "num_heads": 8, "num_kv_heads": 4, "head_dim": 2, "vocab_size": 21}
    return small_architecture(**(sizes | changes))


def _numbered(arch: Architecture, role: str) -> list[torch.Tensor]:
    """Return a row's Hugging Face tensors with every element its own number."""
    row, start, tensors = mapping_of(role, arch), 0, []
    for part in range(len(row.hf)):
        shape = hf_shape(row, part, arch)
        tensors.append(torch.arange(start, start + math.prod(shape), dtype=torch.float64).view(shape))
        start += math.prod(shape)
    return tensors


@settings(deadline=None, max_examples=60)
@given(
    role=st.sampled_from(["embedding", "qkv", "attention_out", "fc1", "fc2", "ffn_norm"]),
    size=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([4, 8]),
    per_group=st.integers(1, 3),
    ffn=st.sampled_from([8, 16, 24]),
    vocab=st.integers(5, 40),
)
def test_shards_hold_every_source_element_once(
    role: str, size: int, groups: int, per_group: int, ffn: int, vocab: int
) -> None:
    arch = _arch(num_heads=groups * per_group, num_kv_heads=groups, ffn_size=ffn, vocab_size=vocab, hidden_size=8)
    row, sources, seen = mapping_of(role, arch), _numbered(arch, role), []
    padded = -(-vocab // size) * size
    for rank in range(size):
        shape = shard_shape(row, arch, Shard(rank, size), padded_vocab=padded)
        shard = torch.full(shape, -1.0, dtype=torch.float64)
        for piece in source_slices(row, arch, Shard(rank, size), shape):
            view = piece.view(shard)
            assert (view == -1).all(), "pieces overlap"
            index = tuple(slice(*bounds) for bounds in piece.source)
            view.copy_(piece.seen(sources[piece.part][index]))
        filled = shard[shard >= 0]
        if row.sharding is not Sharding.VOCABULARY:
            assert filled.numel() == shard.numel(), "a hole"
        seen.append(filled)
    expected = torch.cat([source.flatten() for source in sources])
    found = seen[0] if row.sharding is Sharding.REPLICATED else torch.cat(seen)
    assert torch.equal(found.sort().values, expected)


def test_qkv_rows_are_grouped_as_megatron_wants_them() -> None:
    arch = _arch(num_heads=4, num_kv_heads=2, head_dim=1, hidden_size=1)
    row = mapping_of("qkv", arch)
    shard = torch.empty(shard_shape(row, arch, Shard()))
    q_k_v = [torch.arange(start, start + rows)[:, None].float() for start, rows in ((0, 4), (10, 2), (20, 2))]
    for piece in source_slices(row, arch, Shard(), tuple(shard.shape)):
        view = piece.view(shard)
        view.copy_(piece.seen(q_k_v[piece.part]))
    assert shard.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@pytest.mark.parametrize(
    ("name", "role", "expert"),
    [
        ("mlp.experts.local_experts.11.linear_fc1.weight", "expert_fc1", 11),
        ("mlp.experts.linear_fc2.weight3", "expert_fc2", 3),
        ("self_attention.linear_qkv.layer_norm_weight", "attention_norm", None),
        ("input_layernorm.weight", "attention_norm", None),
        ("pre_mlp_layernorm.weight", "ffn_norm", None),
    ],
)
def test_names_of_both_layer_specs_are_found(name: str, role: str, expert: int | None) -> None:
    found = find_mapping(name, in_layer=True)
    assert found is not None
    assert (found[0].role, found[1]) == (role, expert)


def test_unknown_names_are_not_guessed() -> None:
    unknown = ("self_attention.linear_qkv.biases", "mlp.experts.linear_fc1.weight", "embedding.word_embeddings.weight")
    assert [find_mapping(name, in_layer=True) for name in unknown] == [None] * 3
