"""THE table Megatron <-> Hugging Face. Import, upcycle and export all read it, and nothing else knows a tensor name.

A `Row` says how one Megatron parameter and its Hugging Face tensors are called and cut. `pieces` turns a row into
the exact slices that a rank's shard of the parameter is made of.

Shapes (legend in `architecture.py`): qkv [(H + 2 G) K, D], per key-value group its query heads, then key, then value;
linear_fc1 [2 F, D], gate rows above up rows, each half cut by tensor parallelism on its own; linear_fc2 [D, F].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch

from nemo_upcycle.architecture import Architecture


class Cut(Enum):
    """How tensor parallelism cuts a parameter."""

    #: whole on every rank
    REPLICATED = "replicated"
    #: rows [V, D], padded at the end so that every rank has as many
    VOCABULARY = "vocabulary"
    #: rows, by key-value group
    QKV = "qkv"
    #: rows, gate and up each on its own
    GATED = "gated"
    #: columns
    COLUMNS = "columns"


@dataclass(frozen=True)
class Row:
    """One parameter: its names on both sides and how it is cut.

    Args:
        role: what it is; an expert's role is the dense role behind `expert_`.
        megatron: parameter names, inside the layer for what every layer has, else inside the model. More than one
            where layer specs differ: first Transformer Engine's, then the local spec's.
        checkpoint: names in a Megatron distributed checkpoint, where they differ (experts are stacked there; the local
            spec saves its norms under Transformer Engine's names).
        hf: Hugging Face names, in the order in which Megatron fuses them.
        cut: how tensor parallelism cuts it.
    """

    role: str
    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    cut: Cut
    checkpoint: tuple[str, ...] = ()

    @property
    def in_layer(self) -> bool:
        """Whether every layer has this parameter."""
        return "{layer}" in self.hf[0]

    @property
    def is_expert(self) -> bool:
        """Whether every expert has this parameter, cut by expert-tensor parallelism."""
        return self.role.startswith("expert_")

    @property
    def stored(self) -> tuple[str, ...]:
        """The names to look for in a distributed checkpoint."""
        return self.checkpoint or self.megatron


_HF = "model.layers.{layer}."
_HF_EXPERT = _HF + "block_sparse_moe.experts.{expert}."

#: Outside the layers.
MODEL_ROWS = (
    Row("embedding", ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Cut.VOCABULARY),
    Row("final_norm", ("decoder.final_layernorm.weight",), ("model.norm.weight",), Cut.REPLICATED),
    Row("output", ("output_layer.weight",), ("lm_head.weight",), Cut.VOCABULARY),
)

#: In every layer, dense or MoE.
ATTENTION_ROWS = (
    Row(
        "attention_norm",
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        (_HF + "input_layernorm.weight",),
        Cut.REPLICATED,
    ),
    Row(
        "qkv",
        ("self_attention.linear_qkv.weight",),
        tuple(_HF + f"self_attn.{part}_proj.weight" for part in "qkv"),
        Cut.QKV,
    ),
    Row("attention_out", ("self_attention.linear_proj.weight",), (_HF + "self_attn.o_proj.weight",), Cut.COLUMNS),
    Row(
        "ffn_norm",
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        (_HF + "post_attention_layernorm.weight",),
        Cut.REPLICATED,
    ),
)

#: In a dense layer.
DENSE_ROWS = (
    Row(
        "fc1", ("mlp.linear_fc1.weight",), tuple(_HF + f"mlp.{part}_proj.weight" for part in ("gate", "up")), Cut.GATED
    ),
    Row("fc2", ("mlp.linear_fc2.weight",), (_HF + "mlp.down_proj.weight",), Cut.COLUMNS),
)

#: In an MoE layer. TEGroupedMLP numbers its weights, SequentialMLP its modules; both save the same stacked tensors.
MOE_ROWS = (
    Row("router", ("mlp.router.weight",), (_HF + "block_sparse_moe.gate.weight",), Cut.REPLICATED),
    Row(
        "expert_fc1",
        ("mlp.experts.linear_fc1.weight{expert}", "mlp.experts.local_experts.{expert}.linear_fc1.weight"),
        (_HF_EXPERT + "w1.weight", _HF_EXPERT + "w3.weight"),
        Cut.GATED,
        ("mlp.experts.experts.linear_fc1.weight",),
    ),
    Row(
        "expert_fc2",
        ("mlp.experts.linear_fc2.weight{expert}", "mlp.experts.local_experts.{expert}.linear_fc2.weight"),
        (_HF_EXPERT + "w2.weight",),
        Cut.COLUMNS,
        ("mlp.experts.experts.linear_fc2.weight",),
    ),
)

ROWS = (*MODEL_ROWS, *ATTENTION_ROWS, *DENSE_ROWS, *MOE_ROWS)
BY_ROLE = {row.role: row for row in ROWS}


def layer_rows(arch: Architecture) -> tuple[Row, ...]:
    """Return the rows of one layer of `arch`."""
    return ATTENTION_ROWS + (MOE_ROWS if arch.num_experts else DENSE_ROWS)


def hf_names(arch: Architecture) -> Iterator[str]:
    """Yield the name of every tensor that a Hugging Face checkpoint of `arch` holds, in the model's order."""
    for row in MODEL_ROWS:
        if row.role == "output" and arch.tied_embeddings:
            continue
        if row.role == "final_norm":
            for layer in range(arch.num_layers):
                for layer_row in layer_rows(arch):
                    experts = range(arch.num_experts or 0) if layer_row.is_expert else range(1)
                    yield from (name.format(layer=layer, expert=expert) for expert in experts for name in layer_row.hf)
        yield from row.hf


def find_row(name: str, *, in_layer: bool) -> tuple[Row, int | None] | None:
    """Return the row of a Megatron parameter and the expert number in its name; None where the table has none.

    Args:
        name: the parameter's name inside its layer, or inside the model.
        in_layer: which of the two.

    Example:
        >>> row, expert = find_row("mlp.experts.local_experts.3.linear_fc2.weight", in_layer=True)
        >>> row.role, expert
        ('expert_fc2', 3)
    """
    for row in ROWS:
        if row.in_layer is not in_layer:
            continue
        for template in row.megatron:
            pattern = re.escape(template).replace(re.escape("{expert}"), r"(\d+)")
            if match := re.fullmatch(pattern, name):
                return row, int(match.group(1)) if match.groups() else None
    return None


@dataclass(frozen=True)
class Shard:
    """A rank's place in a tensor-parallel group (expert-tensor-parallel for experts)."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Piece:
    """One slice of a Hugging Face tensor and the rows of the Megatron shard that it is.

    Args:
        part: which of the row's Hugging Face tensors.
        source: the slice of it, as (start, stop) along every axis.
        blocks: the shard's rows are seen as so many equal blocks ...
        rows: ... and the slice fills these rows (start, stop) of every block, block by block.
    """

    part: int
    source: tuple[tuple[int, int], ...]
    blocks: int
    rows: tuple[int, int]

    def view(self, shard: torch.Tensor) -> torch.Tensor:
        """Return the rows of a Megatron shard that this piece is, as a view of shape [blocks, rows, ...]."""
        blocked = shard.view(self.blocks, shard.shape[0] // self.blocks, *shard.shape[1:])
        return blocked[:, self.rows[0] : self.rows[1]]


def hf_shape(row: Row, part: int, arch: Architecture) -> tuple[int, ...]:
    """Return the shape of one of a row's Hugging Face tensors."""
    attention = arch.num_heads * arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (arch.vocab_size, arch.hidden_size),
        "output": (arch.vocab_size, arch.hidden_size),
        "qkv": (attention if part == 0 else arch.num_kv_heads * arch.head_dim, arch.hidden_size),
        "attention_out": (arch.hidden_size, attention),
        "fc1": (arch.ffn_size, arch.hidden_size),
        "fc2": (arch.hidden_size, arch.ffn_size),
        "router": (arch.num_experts or 0, arch.hidden_size),
    }
    return shapes.get(row.role.removeprefix("expert_"), (arch.hidden_size,))


def shard_shape(row: Row, arch: Architecture, shard: Shard, padded_vocab: int | None = None) -> tuple[int, ...]:
    """Return the shape of a rank's shard of a Megatron parameter.

    Args:
        row: the parameter.
        arch: the model's shapes.
        shard: the rank's place.
        padded_vocab: V after padding, for the vocabulary's rows; unpadded when None.
    """
    first = hf_shape(row, 0, arch)
    if row.cut is Cut.VOCABULARY:
        return ((padded_vocab or arch.vocab_size) // shard.size, arch.hidden_size)
    if row.cut is Cut.QKV:
        return ((arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim // shard.size, first[1])
    if row.cut is Cut.GATED:
        return (2 * first[0] // shard.size, first[1])
    if row.cut is Cut.COLUMNS:
        return (first[0], first[1] // shard.size)
    return first


def pieces(row: Row, arch: Architecture, shard: Shard, local_shape: tuple[int, ...]) -> list[Piece]:
    """Return the slices that make up a rank's shard of a parameter.

    Args:
        row: the parameter.
        arch: shapes of the Hugging Face side (for experts made of a dense network: the dense architecture).
        shard: the rank's place in the group that cuts this row.
        local_shape: the shard's shape.

    Returns:
        Pieces whose rows do not overlap. They cover the shard, but for padding rows at the end of a vocabulary.

    Example:
        The second half of the feed-forward's gate and up rows, on rank 1 of 2, with F = 8 and D = 4:
        `Piece(0, ((4, 8), (0, 4)), 1, (0, 4))` and `Piece(1, ((4, 8), (0, 4)), 1, (4, 8))`.
    """
    shapes = [hf_shape(row, part, arch) for part in range(len(row.hf))]
    whole = [tuple((0, size) for size in shape) for shape in shapes]
    if row.cut is Cut.REPLICATED:
        return [Piece(0, whole[0], 1, (0, local_shape[0]))]
    if row.cut is Cut.COLUMNS:
        columns = (shard.rank * local_shape[1], (shard.rank + 1) * local_shape[1])
        return [Piece(0, (whole[0][0], columns), 1, (0, local_shape[0]))]
    if row.cut is Cut.VOCABULARY:
        start = shard.rank * local_shape[0]
        stop = min(start + local_shape[0], arch.vocab_size)
        return [Piece(0, ((start, stop), whole[0][1]), 1, (0, stop - start))] if stop > start else []
    if row.cut is Cut.GATED:
        half = local_shape[0] // 2
        source = ((shard.rank * half, (shard.rank + 1) * half), whole[0][1])
        return [Piece(part, source, 1, (part * half, (part + 1) * half)) for part in range(2)]
    groups = arch.num_kv_heads // shard.size
    found, row_start = [], 0
    for part, heads in enumerate((arch.heads_per_group, 1, 1)):
        rows = heads * arch.head_dim
        source = ((shard.rank * groups * rows, (shard.rank + 1) * groups * rows), whole[part][1])
        found.append(Piece(part, source, groups, (row_start, row_start + rows)))
        row_start += rows
    return found
