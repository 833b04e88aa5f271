"""Shapes of the ranks' shards, and the Hugging Face slices from which each shard is assembled."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.mapping import hf_constants, hf_names, mapping_of, mapping_of_hf
from nemo_upcycle.models.mapping_table import ParamMapping, Sharding


if TYPE_CHECKING:
    import torch  # importing torch takes 1.5 s, and the planner does not need torch


@dataclass(frozen=True)
class Shard:
    """A rank's place in a tensor-parallel group (expert-tensor-parallel for experts)."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class SourceSlice:
    """A slice of a Hugging Face tensor, and the rows of the Megatron shard that it fills.

    Args:
        part: number of the part in the mapping.
        source: (start, stop) of the slice along every axis of the part. In a result of `in_tensor`, along every axis
            of the tensor that holds the part.
        blocks: number of equal row blocks in the shard.
        rows: (start, stop) of the rows that the slice fills in every block, block by block.
    """

    part: int
    source: tuple[tuple[int, int], ...]
    blocks: int
    rows: tuple[int, int]

    def view(self, shard: torch.Tensor) -> torch.Tensor:
        """Return the rows of a Megatron shard that this slice fills, as a view.

        The view has the shape of the slice, or [blocks, rows, ...] if there is more than one block.
        """
        if self.blocks == 1:
            return shard if self.rows == (0, shard.shape[0]) else shard[self.rows[0] : self.rows[1]]
        blocked = shard.view(self.blocks, shard.shape[0] // self.blocks, *shard.shape[1:])
        return blocked[:, self.rows[0] : self.rows[1]]

    def in_tensor(self, mapping: ParamMapping, arch: Architecture) -> SourceSlice:
        """Return the slice of the whole Hugging Face tensor, in which other parts may lie above this part."""
        above = sum(hf_shape(mapping, part, arch)[0] for part in mapping.together(self.part) if part < self.part)
        (start, stop), *rest = self.source
        return replace(self, source=((start + above, stop + above), *rest))

    def seen(self, slice_: torch.Tensor) -> torch.Tensor:
        """Return a slice's tensor in the shape of `view`."""
        return slice_ if self.blocks == 1 else slice_.unflatten(0, (self.blocks, self.rows[1] - self.rows[0]))


def ffn_size(mapping: ParamMapping, arch: Architecture) -> int:
    """Return F of the network that a parameter belongs to: dense, one routed expert, or all shared experts."""
    if mapping.is_expert:
        return arch.expert_ffn_size or 0
    return arch.shared_ffn_size if mapping.is_shared else arch.ffn_size


def hf_shape(mapping: ParamMapping, part: int, arch: Architecture) -> tuple[int, ...]:
    """Return the shape in Hugging Face of one part of a mapping."""
    attention, groups = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    neurons = ffn_size(mapping, arch)
    mixer = arch.mamba or arch.delta
    if mixer and mapping.sharding is Sharding.PARTS:
        kind = mapping.role.partition("_")[2]
        inner = {"in": (arch.hidden_size,), "conv": (1, mixer.conv_size)}
        return (mixer.rows(mapping.parts[part]), *inner.get(kind, ()))
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (arch.vocab_size, arch.hidden_size),
        "output": (arch.vocab_size, arch.hidden_size),
        "qkv": (attention * (2 if arch.output_gate else 1) if part == 0 else groups, arch.hidden_size),
        "qkv_bias": (attention * (2 if arch.output_gate else 1) if part == 0 else groups,),
        "sinks": (arch.num_heads,),
        "attention_out": (arch.hidden_size, attention),
        "query_norm": (attention if arch.wide_qk_norm else arch.head_dim,),
        "key_norm": (groups if arch.wide_qk_norm else arch.head_dim,),
        "mamba_out": (arch.hidden_size, arch.mamba.rows("x") if arch.mamba else 0),
        "delta_out": (arch.hidden_size, arch.delta.rows("value") if arch.delta else 0),
        "delta_norm": (arch.delta.value_dim if arch.delta else 0,),
        "fc1": (neurons, arch.hidden_size),
        "fc1_bias": (neurons,),
        "fc2": (arch.hidden_size, neurons),
        "router": (arch.num_experts or 0, arch.hidden_size),
        "router_bias": (arch.num_experts or 0,),
        "gate": (1, arch.hidden_size),
        "layer_scale": (1,),
    } | dict.fromkeys(BALANCING_BIASES, (arch.num_experts or 0,))
    return shapes.get(mapping.dense_role, (arch.hidden_size,))


def tensor_shape(mapping: ParamMapping, part: int, arch: Architecture) -> tuple[int, ...]:
    """Return the shape of the Hugging Face tensor that holds a part, alone or together with other parts."""
    shapes = [hf_shape(mapping, one, arch) for one in mapping.together(part)]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a Hugging Face checkpoint of `arch`, in the model's order."""
    shapes = {}
    for name in hf_names(arch):
        mapping, part, layer, _ = mapping_of_hf(name, arch)
        shapes[name] = tensor_shape(mapping, part, arch.at(layer) if mapping.in_layer else arch)
    return shapes | hf_constants(arch)


def float32_names(arch: Architecture) -> frozenset[str]:
    """Return the names of the balancing biases, which are float32 whatever the type of the weights is."""
    templates = mapping_of("balancing_bias", arch).hf if arch.balancing_bias else ()
    layers = [layer for layer in range(arch.num_layers) if arch.is_moe_layer(layer)]
    return frozenset(template.format(layer=layer) for template in templates for layer in layers)


@functools.cache
def shard_shape(
    mapping: ParamMapping, arch: Architecture, shard: Shard, padded_vocab: int | None = None
) -> tuple[int, ...]:
    """Return the shape of a rank's shard of a Megatron parameter.

    Args:
        mapping: mapping of the parameter.
        arch: architecture of the model.
        shard: the rank's place.
        padded_vocab: V after padding, for a parameter with rows of the vocabulary; None for no padding.
    """
    first = hf_shape(mapping, 0, arch)
    if mapping.sharding is Sharding.VOCABULARY:
        return ((padded_vocab or arch.vocab_size) // shard.size, arch.hidden_size)
    if mapping.sharding in (Sharding.QKV, Sharding.PARTS):
        rows = sum(hf_shape(mapping, part, arch)[0] for part in range(len(mapping.parts)))
        return (rows // shard.size, *first[1:])
    if mapping.sharding in (Sharding.GATED, Sharding.NEURON_ROWS):
        return (len(mapping.parts) * first[0] // shard.size, *first[1:])
    if mapping.sharding in (Sharding.COLUMNS, Sharding.NEURON_COLUMNS):
        return (first[0], first[1] // shard.size)
    return first


@functools.cache
def source_slices(
    mapping: ParamMapping,
    arch: Architecture,
    shard: Shard,
    local_shape: tuple[int, ...],
    first_neuron: int = 0,
    interleaved: int | None = None,
) -> tuple[SourceSlice, ...]:
    """Return the slices that make up a rank's shard of a parameter.

    Args:
        mapping: mapping of the parameter. For an expert made from a dense network, mapping of the dense parameter.
        arch: architecture of the Hugging Face model.
        shard: the rank's place in the group that cuts this parameter.
        local_shape: shape of the shard.
        first_neuron: neuron of the Hugging Face network at which the (unsharded) parameter begins, if the parameter
            holds only a part of the network.
        interleaved: block size (rows) of interleaved gate and up rows; None if all gate rows are above the up rows.

    Returns:
        Slices whose rows do not overlap. They cover the shard, except for padding rows at the end of a vocabulary.

    Example:
        The second half of the feed-forward's gate and up rows, on rank 1 of 2, with F = 8 and D = 4:
        `SourceSlice(0, ((4, 8), (0, 4)), 1, (0, 4))` and `SourceSlice(1, ((4, 8), (0, 4)), 1, (4, 8))`.
    """
    shapes = [hf_shape(mapping, part, arch) for part in range(len(mapping.parts))]
    rest = [tuple((0, size) for size in shape[1:]) for shape in shapes]
    if mapping.sharding is Sharding.REPLICATED:
        return (SourceSlice(0, ((0, shapes[0][0]), *rest[0]), 1, (0, local_shape[0])),)
    if mapping.sharding in (Sharding.COLUMNS, Sharding.NEURON_COLUMNS):
        start = first_neuron + shard.rank * local_shape[1]
        return (SourceSlice(0, ((0, shapes[0][0]), (start, start + local_shape[1])), 1, (0, local_shape[0])),)
    if mapping.sharding is Sharding.VOCABULARY:
        start = shard.rank * local_shape[0]
        stop = min(start + local_shape[0], arch.vocab_size)
        return (SourceSlice(0, ((start, stop), *rest[0]), 1, (0, stop - start)),) if stop > start else ()
    if mapping.sharding in (Sharding.GATED, Sharding.NEURON_ROWS):
        neurons = local_shape[0] // len(mapping.parts)
        start = first_neuron + shard.rank * neurons
        rows = interleaved or neurons
        return tuple(
            SourceSlice(
                part, ((start, start + neurons), *rest[part]), neurons // rows, (part * rows, (part + 1) * rows)
            )
            for part in range(len(mapping.parts))
        )
    found, row_start = [], 0
    if mapping.sharding is Sharding.PARTS:
        for part, shape in enumerate(shapes):
            rows = shape[0] // shard.size
            source = ((shard.rank * rows, (shard.rank + 1) * rows), *rest[part])
            found.append(SourceSlice(part, source, 1, (row_start, row_start + rows)))
            row_start += rows
        return tuple(found)
    if shard.size > arch.num_kv_heads:
        return tuple(_part_of_group(mapping, arch, shard, local_shape))
    groups = arch.num_kv_heads // shard.size
    if arch.output_gate:
        return tuple(_gated_slices(arch, shard, local_shape[0] // groups, rest))
    for part, heads in enumerate((arch.num_heads // arch.num_kv_heads, 1, 1)):
        rows = heads * arch.head_dim
        source = ((shard.rank * groups * rows, (shard.rank + 1) * groups * rows), *rest[part])
        found.append(SourceSlice(part, source, groups, (row_start, row_start + rows)))
        row_start += rows
    return tuple(found)


def _part_of_group(
    mapping: ParamMapping, arch: Architecture, shard: Shard, local_shape: tuple[int, ...]
) -> Iterator[SourceSlice]:
    """Yield the slices for a rank that gets only a part of a key-value group. Several ranks split the group evenly.

    Megatron-Core 0.16 and later cut the rows of the whole parameter in this way, and gather the ranks' results.
    """
    ranks, rows = shard.size // arch.num_kv_heads, local_shape[0]
    group = Shard(shard.rank // ranks, arch.num_kv_heads)
    first = shard.rank % ranks * rows
    for slice_ in source_slices(mapping, arch, group, (ranks * rows, *local_shape[1:])):
        begin, end = max(slice_.rows[0], first), min(slice_.rows[1], first + rows)
        if begin < end:
            start = slice_.source[0][0] + begin - slice_.rows[0]
            source = ((start, start + end - begin), *slice_.source[1:])
            yield replace(slice_, source=source, rows=(begin - first, end - first))


def in_hf_order(slices: Iterable[SourceSlice]) -> tuple[SourceSlice, ...]:
    """Sort a parameter's slices in the order of the Hugging Face tensors, and join adjacent slices of one part."""
    found: list[SourceSlice] = []
    for slice_ in sorted(slices, key=lambda one: (one.part, one.source[0])):
        (start, stop), *rest = slice_.source
        last = found[-1] if found else None
        if last and last.part == slice_.part and last.source == ((last.source[0][0], start), *rest):
            first, rows = last.source[0][0], last.rows[0]
            slice_ = replace(slice_, source=((first, stop), *rest), rows=(rows, rows + stop - first))
            found.pop()
        found.append(slice_)
    return tuple(found)


def hf_parts(whole: torch.Tensor, mapping: ParamMapping, arch: Architecture) -> dict[int, torch.Tensor]:
    """Split a whole Megatron parameter into its Hugging Face parts.

    Args:
        whole: the parameter. A vocabulary may be padded.
        mapping: mapping of the parameter.
        arch: architecture of the model.
    """
    import torch

    slices = source_slices(mapping, arch, Shard(), tuple(whole.shape))
    rows: dict[int, list[torch.Tensor]] = {}
    for slice_ in sorted(slices, key=lambda one: (one.part, one.source[0])):
        rows.setdefault(slice_.part, []).append(slice_.view(whole).reshape(-1, *whole.shape[1:]))
    return {part: found[0] if len(found) == 1 else torch.cat(found) for part, found in rows.items()}


def _gated_slices(
    arch: Architecture, shard: Shard, group_rows: int, rest: list[tuple[tuple[int, int], ...]]
) -> Iterator[SourceSlice]:
    """Yield the slices of query, gate, key and value, in Megatron's order.

    Hugging Face stores query and gate of each head one below the other. Megatron stores a group's gates after its
    queries.
    """
    width, heads = arch.head_dim, arch.num_heads // arch.num_kv_heads
    for group in range(arch.num_kv_heads // shard.size):
        number, row = shard.rank * (arch.num_kv_heads // shard.size) + group, group * group_rows
        first = 2 * number * heads
        places = [(0, first + 2 * head + is_gate) for is_gate in (0, 1) for head in range(heads)]
        for part, place in (*places, (1, number), (2, number)):
            yield SourceSlice(part, ((place * width, (place + 1) * width), *rest[part]), 1, (row, row + width))
            row += width
