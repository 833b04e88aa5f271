"""The mapping table: the order of rows, and the names that it knows."""

from __future__ import annotations

import pytest
import torch

from nemo_upcycle.models.mapping import find_mapping, mapping_of
from nemo_upcycle.models.sharding import Shard, shard_shape, source_slices
from tests.models import small_architecture


def test_qkv_rows_are_grouped_as_megatron_wants_them() -> None:
    arch = small_architecture(num_heads=4, num_kv_heads=2, head_dim=1, hidden_size=1)
    row = mapping_of("qkv", arch)
    shard = torch.empty(shard_shape(row, arch, Shard()))
    q_k_v = [torch.arange(start, start + rows)[:, None].float() for start, rows in ((0, 4), (10, 2), (20, 2))]
    for piece in source_slices(row, arch, Shard(), tuple(shard.shape)):
        view = piece.view(shard)
        view.copy_(piece.seen(q_k_v[piece.part]))
    assert shard.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("role", ["qkv", "qkv_bias"])
def test_ranks_that_share_a_key_value_head_have_its_rows(role: str, has_gate: bool) -> None:
    arch = small_architecture(num_heads=8, num_kv_heads=2, output_gate=has_gate)
    mapping = mapping_of(role, arch)

    def made(shard: Shard) -> torch.Tensor:
        shape = shard_shape(mapping, arch, shard)
        rows = torch.full(shape[:1], -1)
        for slice_ in source_slices(mapping, arch, shard, shape):
            part = torch.arange(*slice_.source[0]) + 1000 * slice_.part
            slice_.view(rows).copy_(slice_.seen(part))
        return rows

    assert torch.equal(torch.cat([made(Shard(rank, 8)) for rank in range(8)]), made(Shard()))


def test_names_of_both_layer_specs_are_found_and_no_others() -> None:
    known = {
        "mlp.experts.local_experts.11.linear_fc1.weight": ("expert_fc1", 11),
        "mlp.experts.linear_fc2.weight3": ("expert_fc2", 3),
        "self_attention.linear_qkv.layer_norm_weight": ("attention_norm", None),
        "pre_mlp_layernorm.weight": ("ffn_norm", None),
    }
    for name, wanted in known.items():
        mapping, expert = find_mapping(name, in_layer=True) or pytest.fail(name)
        assert (mapping.role, expert) == wanted
    unknown = ("self_attention.linear_qkv.biases", "mlp.experts.linear_fc1.weight", "embedding.word_embeddings.weight")
    assert [find_mapping(name, in_layer=True) for name in unknown] == [None] * 3
