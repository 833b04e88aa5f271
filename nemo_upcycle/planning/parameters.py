"""The parameters of a rank, and Megatron-Core's buffers for parameters, gradients and optimizer states.

The numbers are exact. The counts equal the counts of Megatron's own modules (tests build the modules). The buffers
equal the buffers of Megatron's `DistributedDataParallel` with the distributed optimizer (`_ParamAndGradBuffer` of
Megatron-Core 0.15).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.mapping import layer_mappings, mapping_of
from nemo_upcycle.models.mapping_table import ParamMapping
from nemo_upcycle.models.sharding import Shard, shard_shape
from nemo_upcycle.planning.layout import Chunk, Layout
from nemo_upcycle.planning.workload import Workload


#: Bytes of optimizer states for each parameter. Megatron's Adam keeps a float32 master and two float32 moments; for a
#: matrix, Muon keeps a master and only one moment.
OPTIMIZER_BYTES, MUON_BYTES = 12, 8
#: Bytes of a parameter in BF16.
WEIGHT_BYTES = 2
#: Megatron's default bucket size (elements). Buckets are larger with very many data-parallel ranks.
_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000
#: Parameters start, and buckets end, at multiples of these numbers (elements).
_PARAM_ALIGN, _BUCKET_ALIGN = 64, 128


class Param(NamedTuple):
    """One parameter of a rank.

    Args:
        mapping: row of the mapping table.
        layer: number of the layer in the whole model; None outside the layers.
        shape: shape of the rank's shard.
    """

    mapping: ParamMapping
    layer: int | None
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the rank's shard."""
        return math.prod(self.shape)

    @property
    def muon_bytes(self) -> int:
        """Bytes of the states under Muon. Embeddings, output layer and parameters that are no matrices use Adam."""
        is_matrix = self.layer is not None and len(self.shape) == 2
        return self.numel * (MUON_BYTES if is_matrix else OPTIMIZER_BYTES)

    @property
    def is_linear(self) -> bool:
        """Whether the parameter is the weight of a linear module that can multiply in FP8."""
        return self.layer is not None and len(self.shape) == 2 and self.mapping.role not in ("router", "shared_gate")


def chunk_params(arch: Architecture, layout: Layout, chunk: Chunk) -> list[Param]:
    """List a rank's parameters in a chunk, in the order of Megatron's modules."""
    first = ["embedding"] if chunk.has_embedding else []
    last = ["final_norm"] if chunk.has_output else []
    last += ["output"] if chunk.has_output and not (arch.tied_embeddings and chunk.has_embedding) else []
    vocab, shard = layout.padded_vocab(arch), Shard(0, layout.tp)

    def outside(roles: list[str]) -> list[Param]:
        mappings = [mapping_of(role, arch) for role in roles]
        return [Param(mapping, None, shard_shape(mapping, arch, shard, vocab)) for mapping in mappings]

    sizes = (layout.tp, layout.etp, layout.ep)
    kinds = [(n, _kind(arch, n)) for n in chunk.layers]
    shapes = {kind: _layer_shapes(arch, *kind, *sizes) for kind in {kind for _, kind in kinds}}
    layers = [Param(mapping, n, shape) for n, kind in kinds for mapping, shape in shapes[kind]]
    return outside(first) + layers + outside(last)


#: Order in which Megatron registers attention's modules; the mapping table has Hugging Face's order.
_ATTENTION = (
    *("attention_norm", "attention_out", "attention_out_bias", "qkv", "qkv_bias"),
    *("query_norm", "key_norm", "ffn_norm"),
)
_ORDER = {role: number for number, role in enumerate((*_ATTENTION, "shared_gate"))}
#: Roles that come after a layer's other parameters.
_LAST = ("attention_post_norm", "ffn_post_norm")


def _kind(arch: Architecture, layer: int) -> tuple[bool, str]:
    return arch.is_moe_layer(layer), arch.parts(layer)


@functools.lru_cache(maxsize=1024)
def _layer_shapes(
    arch: Architecture, moe: bool, parts: str, tp: int, etp: int, ep: int
) -> list[tuple[ParamMapping, tuple[int, ...]]]:
    """Return the mapping and the shard shape of every parameter in a kind of layer, one expert after the other."""
    layer = next(n for n in range(arch.num_layers) if _kind(arch, n) == (moe, parts))
    # Balancing biases are left out, because they are buffers.
    mappings = [mapping for mapping in layer_mappings(arch, layer) if mapping.role not in BALANCING_BIASES]
    mappings.sort(key=lambda mapping: _ORDER.get(mapping.role, len(_ORDER)))
    table = [(m, shard_shape(m, arch, Shard(0, etp if m.is_expert else tp))) for m in mappings]
    experts = [item for item in table if item[0].is_expert] * ((arch.num_experts or 0) // ep)
    shared = [item for item in table if item[0].is_shared]
    last = [item for item in table if item[0].role in _LAST]
    return [item for item in table if item not in (*experts, *shared, *last)] + experts + shared + last


def average_params(arch: Architecture, layout: Layout) -> tuple[float, float]:
    """Return an average rank's number of parameters in the dense part and in the routed experts."""
    dense, routed = _all_params(arch)
    return dense / layout.tp / layout.pp, routed / layout.ep / layout.etp / layout.pp


@functools.lru_cache(maxsize=64)
def _all_params(arch: Architecture) -> tuple[float, float]:
    routed = float(arch.moe_layer_count * (arch.num_experts or 0) * arch.expert_params)
    return arch.total_params - routed, routed


@dataclass(frozen=True)
class Buffer:
    """One contiguous buffer of Megatron's data-parallel wrapper.

    Args:
        buckets: (first, end) element of every bucket, padding included.
        gaps: (first, end) element of every piece of padding.
        shards: number of ranks that divide every bucket among themselves.
    """

    buckets: tuple[tuple[int, int], ...]
    gaps: tuple[tuple[int, int], ...]
    shards: int

    @property
    def numel(self) -> int:
        """Number of elements, padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    def owned(self, shard: int) -> int:
        """Return the number of elements whose optimizer states one of the `shards` ranks keeps, without padding."""
        count = 0
        for first, end in self.buckets:
            part = (end - first) // self.shards
            low, high = first + shard * part, first + (shard + 1) * part
            count += part - sum(max(0, min(high, stop) - max(low, start)) for start, stop in self.gaps)
        return count


def lay_out(params: Iterable[tuple[int, bool]], shards: int, bucket: int | None) -> Buffer:
    """Lay out parameters in a buffer as Megatron does with the distributed optimizer.

    Args:
        params: number of elements of each parameter, and whether the parameter needs a bucket of its own (tied
            embeddings over pipeline stages).
        shards: number of ranks that divide a bucket among themselves.
        bucket: number of elements at which a bucket is closed; None for a single bucket.
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


class StageBuffers:
    """The buffers of all ranks of one pipeline stage.

    Args:
        arch: the model's architecture.
        layout: the parallel sizes.
        work: work of a step, which sets the precision of weights and gradients.
        stage: number of the pipeline stage.
    """

    def __init__(self, arch: Architecture, layout: Layout, work: Workload, stage: int) -> None:
        self.chunks = [chunk_params(arch, layout, chunk) for chunk in layout.chunks(arch, stage)]
        params = [param for chunk in self.chunks for param in chunk]
        self.params = sum(param.numel for param in params)
        self.expert_params = sum(param.numel for param in params if param.mapping.is_expert)
        linear = (param for param in params if param.is_linear) if work.numbers.fp8 else ()
        in_fp8 = [param.numel for param in linear if work.is_fp8_layer(arch, param.layer or 0)]
        self.fp8_bytes = round(sum(in_fp8) * work.numbers.copy_bytes)
        self._muon = _muon_states(params, layout, work) if work.optimizer != "adam" else ()
        self.buffers: list[tuple[Buffer, bool]] = []
        least = max(_BUCKET, _BUCKET_PER_RANK * layout.dp)
        apart = ("embedding", "output") if arch.tied_embeddings and layout.pp > 1 else ()
        for number, chunk in enumerate(self.chunks):
            bucket = least if stage == 0 and number == 0 else None
            for expert in (False, True):
                members = [
                    (param.numel, param.mapping.role in apart)
                    for param in chunk
                    # Without expert parallelism, Megatron puts experts into the buffers of the dense parameters.
                    if (param.mapping.is_expert and layout.ep > 1) is expert
                ]
                shards = layout.expert_dp if expert else layout.dense_shards
                self.buffers.append((lay_out(members, shards, bucket), expert))
        # Buffers are padded only for Adam's distributed optimizer.
        numel = self.params if self._muon else sum(buffer.numel for buffer, _ in self.buffers)
        self.weights_bytes = (numel - (sum(in_fp8) if work.low_params else 0)) * WEIGHT_BYTES
        self.gradients_bytes = numel * work.gradient_bytes

    def optimizer_bytes(self, dense_shard: int | None = None, expert_shard: int | None = None) -> int:
        """Return the bytes of a rank's optimizer states, by default of the fullest rank.

        Args:
            dense_shard: number of the rank among the dp x cp ranks that share the dense part; None for the fullest.
            expert_shard: number of the rank among the ranks that share its experts; None for the fullest.
        """
        if self._muon:
            shards = zip(self._muon, (dense_shard, expert_shard), strict=True)
            return sum(max(held) if shard is None else held[shard % len(held)] for held, shard in shards)
        owned = sum(buffer.owned((expert_shard if expert else dense_shard) or 0) for buffer, expert in self.buffers)
        return owned * OPTIMIZER_BYTES


def _muon_states(params: list[Param], layout: Layout, work: Workload) -> tuple[list[int], list[int]]:
    """Return the bytes of Muon's states on each rank that shares the dense part, and on each that shares experts.

    `muon` keeps all states on every rank. `dist_muon` sorts the parameters by size, smallest first. It assigns each
    whole parameter to the next rank, from the first rank to the last and back.
    """
    spreads = work.optimizer == "dist_muon" and layout.dense_shards > 1
    found = []
    for expert, shards in ((False, layout.dense_shards), (True, layout.expert_dp)):
        held = [0] * (shards if spreads else 1)
        turns = [*range(len(held)), *reversed(range(len(held)))]
        members = [param for param in params if (param.mapping.is_expert and layout.ep > 1) is expert]
        for turn, param in enumerate(sorted(members, key=lambda param: param.numel)):
            held[turns[turn % len(turns)]] += param.muon_bytes
        found.append(held)
    return found[0], found[1]


@functools.lru_cache(maxsize=256)
def stage_buffers(arch: Architecture, layout: Layout, work: Workload, stage: int) -> StageBuffers:
    """Return the `StageBuffers` of a stage, cached because a search asks for the same stage repeatedly."""
    return StageBuffers(arch, layout, work, stage)
