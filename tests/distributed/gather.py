"""Assembles the shards of all ranks, placed by Megatron's own checkpoint code."""

from __future__ import annotations

import torch


#: Shard of a rank: name in a checkpoint, offset, data.
GlobalShard = tuple[str, tuple[int, ...], torch.Tensor]


def global_shards(chunks: list[torch.nn.Module]) -> list[GlobalShard]:
    """Return this rank's shards."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

    found: list[GlobalShard] = []
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        state = {k: v for k, v in state.items() if isinstance(v, ShardedTensor | ShardedTensorFactory)}
        apply_factories(state)
        shards = (value for value in nested_values(state) if isinstance(value, ShardedTensor))
        found += [(shard.key, tuple(shard.global_offset), shard.data.detach().clone()) for shard in shards]
    return found


def gather(ranks: list[list[GlobalShard]]) -> dict[str, torch.Tensor]:
    """Assemble the shards of all ranks; shards at the same position must be bit-identical."""
    pieces: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for shards in ranks:
        for key, offset, data in shards:
            place = pieces.setdefault(key, {})
            if offset in place:
                assert torch.equal(place[offset], data), f"replicas of {key} at {offset} differ"
            place[offset] = data
    return {key: _assemble(place) for key, place in pieces.items()}


def _assemble(place: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    prepended = len(next(iter(place))) - next(iter(place.values())).dim()
    shaped = {offset: data.view(*[1] * prepended, *data.shape) for offset, data in place.items()}
    size = [max(o[axis] + d.shape[axis] for o, d in shaped.items()) for axis in range(len(next(iter(shaped))))]
    whole = torch.full(size, float("nan"))
    for offset, data in shaped.items():
        whole[tuple(slice(o, o + s) for o, s in zip(offset, data.shape, strict=True))] = data
    assert not whole.isnan().any()
    return whole
