"""Plans of the tensors in an upcycled model, which upcycling, conversion, verification and receipts share.

Only `ModelPlan` decides how a tensor is made: from which slices of dense tensors, from which of several dense models,
with which factors, and with which changes by the init method. `expand_slice` and `change_copies` carry out the plan.
If the parent has experts, an expert is made from one of the parent's experts, and the router is made from the rows of
the parent's router.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nemo_upcycle.init.calibration_file import calibration_of
from nemo_upcycle.init.experts import ExpertMatrix
from nemo_upcycle.init.methods import METHODS, Method
from nemo_upcycle.init.router import RowNoise, router_weight
from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.growth import expert_scale, router_moves, source_experts
from nemo_upcycle.models.mapping import mapping_of, mapping_of_hf
from nemo_upcycle.models.mapping_table import ParamMapping, Sharding
from nemo_upcycle.models.sharding import Shard, SourceSlice, in_hf_order, shard_shape, source_slices
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.checks import require_finite, require_fits
from nemo_upcycle.sources.same_parent import require_calibration
from nemo_upcycle.sources.several_parents import require_copies
from nemo_upcycle.spec import UpcycleSpec


Bounds = tuple[tuple[int, int], ...]
#: Roles of a router's tensors. These tensors have a row for every expert, and a dense model does not have them.
_ROUTER_ROLES = ("router", "router_bias", *BALANCING_BIASES)
_WHOLE = Shard()


class DenseSlice(NamedTuple):
    """A slice of a dense tensor, and the rows that it fills in the upcycled tensor."""

    name: str
    piece: SourceSlice

    @property
    def bounds(self) -> Bounds:
        """Bounds of the slice: (start, stop) along every axis of the dense tensor."""
        return self.piece.source

    def __str__(self) -> str:
        """Return the slice as the receipt writes it."""
        return f"{self.name}[{', '.join(f'{start}:{stop}' for start, stop in self.bounds)}]"


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of an upcycled model is made. Experts that are copies of one dense slice have equal plans.

    Args:
        mapping: row of the mapping table for the tensor in the upcycled model.
        layer: layer number in the whole model, from 0; None outside the layers.
        slices: dense slices that form the tensor, in the order of its rows; empty for a router that is drawn at
            random.
        shard: the rank's part of the tensor.
        branch: which of several dense models a routed expert comes from; None for all other tensors.
        factors: factors on the tensor, applied in turn; each product is rounded to the tensor's type.
        offset: number that is added to the slices in their own type, before the factors are applied.
        method: init method that changes each expert's copy afterwards; None leaves the copies as they are.
    """

    mapping: ParamMapping
    layer: int | None
    slices: tuple[DenseSlice, ...] = ()
    shard: Shard = _WHOLE
    branch: int | None = None
    factors: tuple[float, ...] = ()
    method: Method | RowNoise | None = None
    offset: float = 0.0

    @property
    def is_router(self) -> bool:
        """Whether the tensor belongs to a router."""
        return self.mapping.role in _ROUTER_ROLES

    @property
    def is_drawn(self) -> bool:
        """Whether the tensor is drawn at random. Only routers are drawn, and only if the parent has no router."""
        return self.is_router and not self.slices

    @property
    def is_down(self) -> bool:
        """Whether the tensor is a down projection, whose columns are the neurons."""
        return self.mapping.sharding is Sharding.NEURON_COLUMNS

    @property
    def parts(self) -> tuple[str, ...]:
        """For each slice, the name of its matrix in the feed-forward network: `gate`, `up` or `down`."""
        return tuple(self.mapping.parts[slice_.piece.part] for slice_ in self.slices)

    @property
    def factor(self) -> float:
        """The product of the factors."""
        return math.prod(self.factors, start=1.0)

    def source(self, dense: DenseSource) -> DenseSource:
        """Return the dense model that the slices are read from. If several models are mixed, it is one of them."""
        return dense if self.branch is None else dense.branches()[self.branch]

    def made_by(self, spec: UpcycleSpec | None) -> str:
        """Return the receipt's text on how the tensor is made."""
        if self.mapping.role != "router" and self.is_drawn:
            return "zero"
        if self.is_drawn and spec:
            if calibration := calibration_of(spec):
                return f"router_init={spec.router_init}, spread={spec.router_spread}, {calibration.name}"
            return f"router_init={spec.router_init}, std={spec.router_std}, seed={spec.seed}"
        words = ["copied", *([f"plus {self.offset:g}"] if self.offset else [])]
        words += [f"times {factor:.6g}" for factor in self.factors]
        return ", ".join([*words, self.method.made_by(spec)] if self.method and spec else words)

    def drawn(self, spec: UpcycleSpec, hidden_size: int) -> torch.Tensor:
        """Return a router's weight [E, D] or bias [E], in float32."""
        if self.mapping.role != "router":
            return torch.zeros(spec.num_experts)
        assert self.layer is not None
        return router_weight(spec, self.layer, hidden_size)


@dataclass(frozen=True)
class ModelPlan:
    """The plan of a whole model. The plans of the model's tensors follow from it.

    Args:
        dense: architecture of the dense model.
        moe_arch: architecture of the upcycled model; the dense architecture if nothing is upcycled.
        spec: how the dense model is upcycled; None to keep it dense.
        parents: number of dense models; the copies come from these models in turn.
    """

    dense: Architecture
    moe_arch: Architecture
    spec: UpcycleSpec | None
    parents: int = 1

    @staticmethod
    def of(dense: DenseSource, spec: UpcycleSpec | None) -> ModelPlan:
        """Plan the upcycling of an open dense checkpoint. Without a spec, plan the unchanged dense model.

        Raises:
            SpecError: the spec does not fit, does not name the calibration file that it needs, or leaves out a parent.
            CheckpointError: the calibration file is from another model or from other settings.
            UpcycleError: the calibration file is missing, damaged, or not a calibration file.
        """
        arch = dense.architecture
        if spec is None:
            return ModelPlan(arch, arch, None)
        require_copies(dense, spec.copies)
        require_calibration(dense, spec)
        return ModelPlan(arch, arch.upcycled(spec), spec, len(dense.branches()))

    def tensor(
        self,
        mapping: ParamMapping,
        layer: int | None,
        expert: int,
        *,
        shard: Shard = _WHOLE,
        shape: tuple[int, ...] | None = None,
        hf_part: int | None = None,
        interleaved: int | None = None,
    ) -> TensorPlan:
        """Decide how a tensor is made.

        Copy c of the dense network, cut into G shards, becomes the experts c G to c G + G - 1, and comes from parent c
        modulo `parents`. The outputs of routed and shared experts are scaled so that their sum stays exact. If the
        parent has experts, `source_experts` decides which of the parent's experts is copied. The parent's shared
        experts and all other tensors then stay as they are.

        Args:
            mapping: row of the mapping table for the tensor in the upcycled model.
            layer: layer number in the whole model; None outside the layers.
            expert: number of the routed expert over all ranks; 0 for all other tensors.
            shard: the rank's part of the tensor.
            shape: shape of the shard, needed if a vocabulary may be padded.
            hf_part: which Hugging Face part of a fused Megatron parameter to plan; None plans the whole parameter.
            interleaved: rows of a block if blocks of gate and up rows alternate, see `source_slices`; None if all gate
                rows come before all up rows.
        """
        dense, moe, spec = self.dense, self.moe_arch, self.spec
        if layer is not None:
            dense, moe = dense.at(layer), moe.at(layer)
        grows = bool(dense.num_experts)
        if mapping.role in _ROUTER_ROLES and not grows:
            return TensorPlan(mapping, layer, shard=shard)
        tied = mapping.role == "output" and dense.tied_embeddings
        source = mapping_of("embedding" if tied else mapping.role if grows else mapping.dense_role, dense)
        copy, first_neuron = 0, 0
        is_copied = grows and (mapping.is_expert or mapping.role in _ROUTER_ROLES)
        sources = source_experts(dense, spec, layer) if is_copied else ()
        if mapping.is_expert and moe.expert_ffn_size and not grows:
            copy, part = divmod(expert, dense.ffn_size // moe.expert_ffn_size)
            first_neuron = part * moe.expert_ffn_size
        shape = shape or shard_shape(mapping, moe, shard)
        number = sources[expert] if mapping.is_expert and sources else 0
        pieces = source_slices(source, dense, shard, shape, first_neuron, interleaved)
        if hf_part is not None:
            pieces = in_hf_order(piece for piece in pieces if piece.part in mapping.together(hf_part))
        slices = tuple(
            DenseSlice(source.hf[piece.part].format(layer=layer, expert=number), piece.in_tensor(source, dense))
            for piece in pieces
        )
        offset = (mapping.hf_offset if hf_part is not None else 0.0) - source.hf_offset
        branch = copy % self.parents if mapping.is_expert else None
        factors = _factors(mapping, source, expert, dense, spec, hf_part) if spec or grows else ()
        found = METHODS[spec.method] if spec and mapping.is_expert and not mapping.role.endswith("_bias") else None
        method: Method | RowNoise | None = found if found and found.computes else None
        if sources and mapping.role in _ROUTER_ROLES:
            slices = tuple(_rows_of(slices[0], sources))
            method = RowNoise(sources) if spec and mapping.role == "router" and router_moves(spec) else None
        return TensorPlan(mapping, layer, slices, shard, branch, factors, method, offset)

    def hf_tensor(self, hf_name: str) -> tuple[TensorPlan, int]:
        """Decide how a tensor of the Hugging Face model is made. Also return the number of its routed expert."""
        mapping, part, layer, expert = mapping_of_hf(hf_name, self.moe_arch)
        return self.tensor(mapping, layer if mapping.in_layer else None, expert, hf_part=part), expert


def _rows_of(whole: DenseSlice, sources: Sequence[int]) -> Iterator[DenseSlice]:
    """Yield slices of a tensor with one row per parent expert, from which the larger tensor is assembled."""
    _, *rest = whole.bounds
    starts = [row for row, source in enumerate(sources) if row == 0 or source != sources[row - 1] + 1]
    for row, end in itertools.pairwise([*starts, len(sources)]):
        first = sources[row]
        piece = SourceSlice(whole.piece.part, ((first, first + end - row), *rest), 1, (row, end))
        yield DenseSlice(whole.name, piece)


def _factors(
    mapping: ParamMapping,
    source: ParamMapping,
    expert: int,
    dense: Architecture,
    spec: UpcycleSpec | None,
    hf_part: int | None,
) -> tuple[float, ...]:
    """Return the factors on a tensor. The spec scales only the weight and bias after a network's activation.

    A dense class with factors has the same factor for all parts of a parameter.
    """
    of_role: dict[str, float] = {}
    if spec and dense.num_experts:
        of_role = dict.fromkeys(("expert_fc2", "expert_fc2_bias"), expert_scale(dense, spec))
    elif spec:
        of_role = {
            "expert_fc2": spec.expert_scale(expert),
            "expert_fc2_bias": spec.bias_scale,
            "shared_fc2": 1.0 if dense.keeps_network else spec.shared_scale,  # the kept network has its own norm
        }
    factors = (
        of_role.get(mapping.role, 1.0),
        (1.0 if hf_part is None else mapping.hf_factors[hf_part]) / source.hf_factors[0],
    )
    return tuple(factor for factor in factors if factor != 1.0)


def expand_slice(
    plan: TensorPlan,
    name: str,
    slice_: torch.Tensor,
    source: DenseSource,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cast a dense slice, or some of its rows, and scale it in the new type.

    An offset is added before the cast, in the slice's own type.

    Args:
        plan: plan of the tensor that the slice is a part of.
        name: name of the dense tensor.
        slice_: slice that was read.
        source: checkpoint that the slice was read from, for error messages.
        dtype: type of the result.
        out: tensor to write into; by default a new tensor, or the slice itself if nothing changes.

    Raises:
        BrokenWeights: the slice holds NaN, infinity or a number too large for the type.
    """
    slice_ = slice_ + plan.offset if plan.offset else slice_
    made = slice_.to(dtype) if out is None else out.copy_(slice_)
    for factor in plan.factors:
        made = torch.mul(made, factor, out=out)
    require_finite(slice_, name, source, made=made)
    return made


def change_copies(
    plan: TensorPlan, spec: UpcycleSpec, source: DenseSource, experts: Sequence[int], tensors: Sequence[torch.Tensor]
) -> None:
    """Let the init method change every expert's copy, in place.

    Args:
        plan: plan of the tensors; without a method nothing happens.
        spec: spec of the upcycling, with the strength and the seed of the change.
        source: checkpoint to read again if this rank holds only a part of the matrix because of tensor parallelism.
        experts: numbers of the experts over all ranks; 0 for a router.
        tensors: copies of these experts.

    Raises:
        BrokenWeights: a changed value is too large for the type.
    """
    if plan.method is None:
        return
    assert plan.layer is not None
    for expert, tensor in zip(experts, tensors, strict=True):
        views = [tensor.T] if plan.is_down else _matrices(plan, tensor)
        for part, dense_slice, view_FD in zip(plan.parts, plan.slices, views, strict=not plan.is_router):
            whole_FD = functools.cache(functools.partial(_whole_matrix, plan, dense_slice, source, view_FD))
            first = plan.shard.rank * view_FD.shape[0]
            plan.method.change(ExpertMatrix(plan.layer, expert, part, first, view_FD, whole_FD), spec)
            require_fits(view_FD, dense_slice.name, source)
            if dense_slice.piece.blocks > 1:
                dense_slice.piece.view(tensor).copy_(dense_slice.piece.seen(view_FD))


def _matrices(plan: TensorPlan, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the matrices [F, D] that a tensor stacks, as views, or as copies if their rows interleave."""
    if plan.is_router:
        return [tensor]
    if plan.slices[0].piece.blocks == 1:
        return tensor.chunk(len(plan.parts))
    return [piece.view(tensor).flatten(0, 1) for _, piece in plan.slices]


def _whole_matrix(
    plan: TensorPlan, dense_slice: DenseSlice, source: DenseSource, local_FD: torch.Tensor
) -> torch.Tensor:
    """Return all neurons of an expert's matrix, including the neurons on other ranks."""
    if plan.shard.size == 1:
        return local_FD.clone()
    count, axis = local_FD.shape[0], int(plan.is_down)
    bounds = list(dense_slice.bounds)
    first = bounds[axis][0] - plan.shard.rank * count
    bounds[axis] = (first, first + plan.shard.size * count)
    whole = source.read(dense_slice.name, bounds)
    whole = expand_slice(plan, dense_slice.name, whole, source, local_FD.dtype).to(local_FD.device)
    return whole.T if plan.is_down else whole
