"""Qwen3.5 layers in Megatron's order: gates follow their group's queries, and each part of a delta net is sharded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_upcycle.models.delta_nets import gate_fields, gates_of, wrong_gates
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.models.mapping import layer_mappings, mapping_of
from nemo_upcycle.models.sharding import Shard, hf_parts, hf_shape, hf_shapes, shard_shape, source_slices


CONFIG: dict[str, Any] = {
    **{"architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2, "vocab_size": 16},
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 2, "linear_value_head_dim": 3},
}
ARCH = architecture_from_config(CONFIG)


def _parts(role: str) -> list[torch.Tensor]:
    mapping = mapping_of(role, ARCH)
    return [torch.randn(hf_shape(mapping, part, ARCH)) for part in range(len(mapping.parts))]


def _shard(role: str, parts: list[torch.Tensor], shard: Shard) -> torch.Tensor:
    mapping = mapping_of(role, ARCH)
    filled = torch.full(shard_shape(mapping, ARCH, shard), torch.nan)
    for slice_ in source_slices(mapping, ARCH, shard, tuple(filled.shape)):
        rows = parts[slice_.part][tuple(slice(*bounds) for bounds in slice_.source)]
        slice_.view(filled).copy_(slice_.seen(rows))
    return filled


def test_gates_stand_behind_the_queries_of_their_group() -> None:
    query, key, value = _parts("qkv")
    by_head = query.view(4, 2, 2, 2, 8)  # [group, head, query or gate, row, column]
    expected = torch.cat(
        [by_head[:, :, 0].flatten(1, 2), by_head[:, :, 1].flatten(1, 2), key.view(4, 2, 8), value.view(4, 2, 8)], dim=1
    )
    assert torch.equal(_shard("qkv", [query, key, value], Shard()), expected.flatten(0, 1))


@pytest.mark.parametrize("role", ["qkv", "delta_in", "delta_conv", "delta_a", "delta_out"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_has_its_heads_of_every_part(role: str, size: int) -> None:
    parts = _parts(role)
    whole = _shard(role, parts, Shard())
    shards = [_shard(role, parts, Shard(rank, size)) for rank in range(size)]
    if role == "delta_out":
        assert torch.equal(torch.cat(shards, dim=1), whole)
    elif role == "qkv":
        assert torch.equal(torch.cat(shards), whole)
    else:
        rows = [len(part) // size for part in parts]
        for place, part in enumerate(parts):
            assert torch.equal(torch.cat([shard.split(rows)[place] for shard in shards]), part)
    assert all(
        torch.equal(found, parts[part]) for part, found in hf_parts(whole, mapping_of(role, ARCH), ARCH).items()
    )


@pytest.mark.parametrize(
    ("name", "agrees"), [("gated_delta_net", True), ("gdn", True), ("gdn2", False), (None, False)]
)
def test_both_names_of_the_nets_are_taken_and_no_other(name: str | None, agrees: bool) -> None:
    """Megatron-Core 0.20 and later report `gdn` for both accepted names."""
    config = SimpleNamespace(**gate_fields(ARCH) | {"experimental_attention_variant": name}, num_layers=4)
    assert all(got == wanted for _, got, wanted in wrong_gates(config, ARCH)) == agrees


def test_every_fourth_layer_has_attention_and_all_numbers_are_counted() -> None:
    assert [ARCH.parts(layer) for layer in range(4)] == ["G-", "G-", "G-", "*-"]
    roles = [{mapping.role for mapping in layer_mappings(ARCH, layer)} for layer in (0, 3)]
    assert roles[0] - roles[1] == {f"delta_{name}" for name in ("in", "conv", "a", "dt_bias", "norm", "out")}
    assert ARCH.total_params == sum(torch.Size(shape).numel() for shape in hf_shapes(ARCH).values())


def test_megatrons_settings_say_which_layers_have_a_net() -> None:
    fields = gate_fields(ARCH)
    config = type("Config", (), fields | {"num_layers": 4})
    assert gates_of(config) == {"output_gate": True, "delta": ARCH.delta}
    assert fields["linear_attention_freq"] == [1, 1, 1, 0]
