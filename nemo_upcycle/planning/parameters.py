"""Every parameter of a rank, and the buffers that Megatron-Core lays parameters, gradients and optimizer states into.

Exact: the counts equal those of Megatron's own modules (`--check` builds them), the buffers those of its
`DistributedDataParallel` with the distributed optimizer (`_ParamAndGradBuffer` of Megatron-Core 0.15).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.layout import Chunk, Layout
from nemo_upcycle.planning.workload import Workload


#: Megatron's Adam keeps a float32 master and two float32 moments of every parameter.
OPTIMIZER_BYTES = 12
#: Parameters are BF16.
WEIGHT_BYTES = 2
#: Megatron's default; larger with very many data-parallel ranks.
_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000
#: Parameters begin, and buckets end, at multiples of so many elements.
_PARAM_ALIGN, _BUCKET_ALIGN = 64, 128


class Param(NamedTuple):
    """One parameter of a rank.

    Args:
        role: what it is, as in the mapping table.
        layer: its layer in the whole model; None outside the layers.
        numel: elements of the rank's shard.
        is_expert: whether it belongs to a routed expert.
        is_linear: whether it is the weight of a linear layer that can multiply in FP8.
    """

    role: str
    layer: int | None
    numel: int
    is_expert: bool = False
    is_linear: bool = False


def chunk_params(arch: Architecture, layout: Layout, chunk: Chunk) -> list[Param]:
    """Return the parameters of one chunk on any rank that holds it, in the order of Megatron's modules."""
    width, tied = arch.hidden_size, arch.tied_embeddings
    vocabulary = layout.padded_vocab(arch) // layout.tp * width
    found = [Param("embedding", None, vocabulary)] if chunk.has_embedding else []
    for layer in chunk.layers:
        found += _layer(arch, layout, layer)
    if chunk.has_output:
        found.append(Param("final_norm", None, width))
        if not (tied and chunk.has_embedding):
            found.append(Param("output", None, vocabulary))
    return found


def _layer(arch: Architecture, layout: Layout, layer: int) -> list[Param]:
    return [
        Param(role, layer, numel, expert, linear)
        for role, numel, expert, linear in _kind(arch, layout.tp, layout.ep, layout.etp, arch.is_moe_layer(layer))
    ]


def _kind(arch: Architecture, tp: int, ep: int, etp: int, moe: bool) -> list[tuple[str, int, bool, bool]]:
    """Return role, elements, whether a routed expert's and whether linear, of a dense or an MoE layer."""
    width = arch.hidden_size
    heads = arch.num_heads * arch.head_dim
    both = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    found = [("attention_norm", width, False, False), ("attention_out", heads * width // tp, False, True)]
    found += [("attention_out_bias", width, False, False)] if arch.attention_out_bias else []
    found += [("qkv", both * width // tp, False, True)]
    found += [("qkv_bias", both // tp, False, False)] if arch.qkv_bias else []
    found += [("ffn_norm", width, False, False)]
    if not moe:
        return found + _network("", arch, arch.ffn_size, tp)
    found.append(("router", (arch.num_experts or 0) * width, False, False))
    found += [("router_bias", arch.num_experts or 0, False, False)] if arch.ffn_bias else []
    expert = [
        (role, numel, True, linear)
        for role, numel, _, linear in _network("expert_", arch, arch.expert_ffn_size or 0, etp)
    ]
    found += expert * ((arch.num_experts or 0) // ep)
    return found + (_network("shared_", arch, arch.shared_ffn_size, tp) if arch.shared_ffn_size else [])


def _network(prefix: str, arch: Architecture, neurons: int, cut: int) -> list[tuple[str, int, bool, bool]]:
    rows, width = (2 if arch.gated else 1) * neurons, arch.hidden_size
    bias = arch.ffn_bias and prefix != "shared_"
    found = [(f"{prefix}fc1", rows * width // cut, False, True)]
    found += [(f"{prefix}fc1_bias", rows // cut, False, False)] if bias else []
    found += [(f"{prefix}fc2", neurons * width // cut, False, True)]
    return found + ([(f"{prefix}fc2_bias", width, False, False)] if bias else [])


@dataclass(frozen=True)
class Buffer:
    """One contiguous buffer of Megatron's data-parallel wrapper.

    Args:
        buckets: (first, end) element of every bucket, padding included.
        gaps: (first, end) of what is padding.
        shards: ranks that share out every bucket.
    """

    buckets: tuple[tuple[int, int], ...]
    gaps: tuple[tuple[int, int], ...]
    shards: int

    @property
    def numel(self) -> int:
        """Elements, padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    def owned(self, shard: int) -> int:
        """Return the elements whose optimizer states one of the sharing ranks keeps."""
        count = 0
        for first, end in self.buckets:
            part = (end - first) // self.shards
            low, high = first + shard * part, first + (shard + 1) * part
            count += part - sum(max(0, min(high, stop) - max(low, start)) for start, stop in self.gaps)
        return count


def lay_out(params: Iterable[tuple[int, bool]], shards: int, bucket: int | None) -> Buffer:
    """Return the buffer that Megatron makes of parameters with the distributed optimizer.

    Args:
        params: elements of each, and whether it needs a bucket of its own (tied embeddings over pipeline stages).
        shards: ranks that share out a bucket.
        bucket: elements at which a bucket is closed; None for a single one.
    """
    multiple = math.lcm(shards, _BUCKET_ALIGN)
    buckets, gaps = [], []
    start = begin = end = 0
    held = False

    def close() -> int:
        padded = _round_up(end, multiple)
        buckets.append((begin, padded))
        gaps.append((end, padded))
        return padded

    for numel, alone in reversed(list(params)):
        start = _round_up(end, _PARAM_ALIGN)
        if alone and held:
            gaps.append((end, start))
            end = start
            start = begin = end = close()
        gaps.append((end, start))
        end, held = start + numel, True
        if alone or (bucket is not None and end - begin >= bucket):
            begin = end = close()
            held = False
    if held:
        close()
    return Buffer(tuple(buckets), tuple((a, b) for a, b in gaps if b > a), shards)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class States:
    """Bytes of a rank's parameters, gradients and optimizer states, and its parameters."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    fp8_bytes: int
    params: int
    expert_params: int


class StagePlan:
    """The buffers of all ranks of one pipeline stage.

    Args:
        arch: of the model.
        layout: the cluster's.
        work: precision and gradients count.
        stage: the pipeline stage.
    """

    def __init__(self, arch: Architecture, layout: Layout, work: Workload, stage: int) -> None:
        self.layout = layout
        self.chunks = [chunk_params(arch, layout, chunk) for chunk in layout.chunks(arch, stage)]
        every = [param for chunk in self.chunks for param in chunk]
        self.params = sum(param.numel for param in every)
        self.expert_params = sum(param.numel for param in every if param.is_expert)
        in_fp8 = [p for p in every if p.is_linear and p.layer is not None and work.is_fp8_layer(arch, p.layer)]
        self.fp8_bytes = sum(param.numel for param in in_fp8) * work.numbers.copy_bytes
        self.buffers: list[tuple[Buffer, bool]] = []
        least = max(_BUCKET, _BUCKET_PER_RANK * layout.dp)
        apart = arch.tied_embeddings and layout.pp > 1
        for number, chunk in enumerate(self.chunks):
            bucket = least if stage == 0 and number == 0 else None
            for expert in (False, True):
                members = [
                    (param.numel, apart and param.role in ("embedding", "output"))
                    for param in chunk
                    # Experts that are not spread lie among the dense parameters.
                    if (param.is_expert and layout.ep > 1) is expert
                ]
                shards = layout.expert_dp if expert else layout.dense_shards
                self.buffers.append((lay_out(members, shards, bucket), expert))
        self._gradient_bytes = work.gradient_bytes

    def states(self, dense_shard: int = 0, expert_shard: int = 0) -> States:
        """Return what a rank of the stage holds.

        Args:
            dense_shard: its place among the ranks that share out the dense part: dp x cp.
            expert_shard: its place among those that share out its experts.
        """
        owned = sum(buffer.owned(expert_shard if expert else dense_shard) for buffer, expert in self.buffers)
        return States(
            weights_bytes=sum(buffer.numel for buffer, _ in self.buffers) * WEIGHT_BYTES,
            gradients_bytes=sum(buffer.numel for buffer, _ in self.buffers) * self._gradient_bytes,
            optimizer_bytes=owned * OPTIMIZER_BYTES,
            fp8_bytes=self.fp8_bytes,
            params=self.params,
            expert_params=self.expert_params,
        )


def rank_states(arch: Architecture, layout: Layout, work: Workload, rank: int) -> States:
    """Return what one rank holds.

    Example:
        Rank 37 of Llama-3-8B-E8T2 on 512 GPUs with TP2 PP4 VP8 EP8 holds 1_840_054_272 parameters.
    """
    seat = layout.seat(rank)
    plan = StagePlan(arch, layout, work, seat.pp)
    return plan.states(seat.dp * layout.cp + seat.cp, seat.expert_dp)
