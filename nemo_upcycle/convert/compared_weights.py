"""Compare the weights of an MoE model with the weights of its dense parent.

Every expert's matrix is compared with the shard of the dense network from which the matrix was made. The matrix may
equal the shard, it may be a multiple of the shard, or some of its neurons may be changed. No model is loaded as a
whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.growth import growth_spec, inexact_because
from nemo_upcycle.models.hf_config import trained_architecture
from nemo_upcycle.models.layer_settings import MULTIPLIERS
from nemo_upcycle.models.mapping import constant_tensors, hf_constants, hf_names
from nemo_upcycle.models.sharding import float32_names
from nemo_upcycle.online.tensor_plan import ModelPlan, TensorPlan
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.checks import check_source, require_finite, rounded, rounded_because
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.progress import track


_BLOCK_BYTES = 32 << 20
#: Settings that change the function or the shapes if their values differ from the parent's values.
_KEPT = (
    *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"),
    *("activation", "rope_theta", "rope_scaling", "rotary_percent", "rope_pattern", "window", "qkv_bias"),
    *("qk_norm", "wide_qk_norm", "pre_norm", "post_norm", "zero_centered_norm", "softmax_scale", *MULTIPLIERS),
    *("global_heads", "keeps_network", "output_gate", "delta", "softmax_type"),
)


#: Settings that a parent with experts shares with all models made from it.
_COPIED = (
    *("expert_ffn_size", "shared_ffn_size", "shared_gate", "moe_pattern", "norm_topk", "router_score"),
    *("routed_scaling_factor", "balancing_bias"),
)


@dataclass
class _Routers:
    """Facts about all routers: whether all are zero, whether each copy's experts share one row, the largest std."""

    zero: bool = True
    tied: bool = True
    std: float = 0.0

    def look_at(self, weight_ED: torch.Tensor, granularity: int) -> None:
        """Include the router of one layer."""
        copies = weight_ED.unflatten(0, (-1, granularity))
        self.zero &= not weight_ED.any()
        self.std = max(self.std, float(weight_ED.float().std()))
        self.tied &= bool((copies == copies[:, :1]).all())


@dataclass
class WeightGroup:
    """The tensors of one kind, over all layers and experts.

    Args:
        kind: `expert gate`, `expert up`, `expert down`, `shared gate`, `shared up`, `shared down`, `router`, or
            `everything else`.
        tensors: number of tensors.
        identical: number of tensors that equal the dense model's bit by bit (in the MoE model's type).
        scales: factors between the tensors and the dense tensors, rounded.
        changed: smallest and largest share of a matrix's neurons that differ from the dense neurons times the factor.
    """

    kind: str
    tensors: int = 0
    identical: int = 0
    scales: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=lambda: [1.0, 0.0])

    def add(self, scale: float, changed: float) -> None:
        """Count one tensor."""
        self.tensors += 1
        self.identical += scale == 1.0 and changed == 0.0
        self.scales = sorted({*self.scales, round(scale, 4)})
        self.changed = [min(self.changed[0], changed), max(self.changed[1], changed)]

    def __str__(self) -> str:
        """Return the group as a line of a table."""
        name = f"  {self.kind:<16}"
        if self.kind == "router":
            return f"{name}{self.tensors}"
        if self.identical == self.tensors:
            return f"{name}{self.tensors} of {self.tensors} identical"
        factors = ", ".join(f"{scale:g}" for scale in self.scales[:4]) + (" ..." if len(self.scales) > 4 else "")
        low, high = (f"{100 * part:.3g}" for part in self.changed)
        changed = "" if self.changed[1] == 0 else f"; {low} to {high} % of the neurons changed"
        return f"{name}{self.identical} of {self.tensors} identical; factors {factors}{changed}"


class WeightComparison(NamedTuple):
    """The differences between the weights of an MoE model and the weights of its parent.

    Args:
        groups: differences of each kind of tensor.
        exact: whether these weights compute the dense function, except for rounding.
        rounded: reasons why weights lost digits.
        granularity: number of parts that the dense network was cut into.
    """

    groups: tuple[WeightGroup, ...]
    exact: bool
    rounded: tuple[str, ...]
    granularity: int


def compare_weights(dense: DenseSource, moe: DenseSource, expert_utility: Path | None = None) -> WeightComparison:
    """Find out how an MoE model's weights differ from the dense model's, and whether they compute the dense function.

    The weights compute the dense function under two conditions. First, all weights equal the dense model's weights,
    except that the experts' down projection is scaled as the model's routing requires (`UpcycleSpec.down_scale`).
    Second, the router does not change the sum of the experts (`models/growth.py`). If the parent has experts, the
    router's rows must equal rows of the parent's router.

    Args:
        dense: open dense model.
        moe: open MoE model.
        expert_utility: for a parent with experts, the file that gives some experts more copies; None if all
            experts have equally many copies.

    Raises:
        CheckpointError: the tensors of a folder do not match its configuration, a tensor holds NaN or infinity, or the
            MoE model is from another parent.
    """
    check_source(dense)
    arch = dense.architecture
    moe_arch = moe.architecture if arch.num_experts else trained_architecture(moe.path)
    _check_child(arch, moe_arch, moe)
    routers = _Routers()
    groups: dict[str, WeightGroup] = {}
    dtypes: dict[torch.dtype, None] = {}
    is_exact = _constants_are_as_written(moe)
    spec = _spec_of(arch, moe_arch, utility=expert_utility)
    if arch.num_experts:
        arch.upcycled(spec)  # checks that parent and spec fit
    names, float32 = list(hf_names(moe_arch)), float32_names(moe_arch)
    model_plan = ModelPlan(arch, moe_arch, spec)
    for name in track(names, "compare weights", len(names)):
        plan, _ = model_plan.hf_tensor(name)
        kind = _kind(plan)
        group = groups.setdefault(kind, WeightGroup(kind))
        if plan.is_drawn:
            group.tensors += 1
            require_finite(router_ED := moe.read(name), name, moe)
            if plan.mapping.role == "router":
                routers.look_at(router_ED, spec.granularity)
            else:  # biases start at zero
                is_exact &= not router_ED.any()
            continue
        dtypes[moe.dtype(name)] = None
        scale, changed = _relation(_pairs(dense, moe, name, plan), plan.is_down, plan.factor)
        group.add(scale, changed)
        is_exact &= changed == 0.0 and scale == plan.factor
        if name in float32:  # rounding these would change the choice of experts
            is_exact &= not any(rounded({name: dense.dtype(plan.slices[0].name)}, moe.dtype(name)))
    router = moe_arch.router_kind
    if not moe_arch.norm_topk and not router.pre_softmax and router.sums_to_one(spec):
        is_exact = False  # with this router, every spec divides several scores by their sum
    is_exact &= routers.tied and not inexact_because(arch, _spec_of(arch, moe_arch, routers, expert_utility))
    lossy = [why for dtype in dtypes for why in rounded_because(dense, dtype, spec, written=moe_arch)]
    return WeightComparison(tuple(groups.values()), is_exact, tuple(lossy), spec.granularity)


def _constants_are_as_written(moe: DenseSource) -> bool:
    """Return whether the constant tensors of the Hugging Face class have the values that this package writes."""
    written: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    for name in hf_constants(moe.architecture):
        found = moe.read(name)
        if found.dtype not in written:
            written[found.dtype] = constant_tensors(moe.architecture, found.dtype)
        if not torch.allclose(found, written[found.dtype][name], rtol=0, atol=1e-7):  # 1e-7 cannot change 0.5
            return False
    return True


def _check_child(arch: Architecture, moe_arch: Architecture, moe: DenseSource) -> None:
    kept = (*_KEPT, *(_COPIED if arch.num_experts else ()))
    checks = [(name, getattr(moe_arch, name), getattr(arch, name)) for name in kept]
    checks.append(("rms_norm_eps", moe_arch.norm_eps, arch.norm_eps))
    if moe_arch.tied_embeddings:  # a tied parent's output matrix may be written as a separate tensor
        checks.append(("tied_embeddings", True, arch.tied_embeddings))
    for name, got, wanted in checks:
        if got != wanted:
            expected, fix = f"{wanted}, as in the parent", "compare a model with its own parent"
            raise CheckpointError(f"{moe.path}: {name}", got=got, expected=expected, fix=fix)
    width = moe_arch.expert_ffn_size or 0
    if not arch.num_experts and (
        arch.ffn_size % width
        or moe_arch.shared_ffn_size % width
        or (moe_arch.num_experts or 0) % (arch.ffn_size // width)
    ):
        raise CheckpointError(
            f"MoE {moe.path}",
            kind="state",
            got=(
                f"has {moe_arch.num_experts} experts of {width} neurons and {moe_arch.shared_ffn_size} shared "
                f"neurons, which cannot be whole copies of the parent's {arch.ffn_size} neurons"
            ),
            fix="give the parent from which the MoE was made",
        )
    check_source(moe)


def _spec_of(
    arch: Architecture, moe_arch: Architecture, routers: _Routers | None = None, utility: Path | None = None
) -> UpcycleSpec:
    """Return a spec of plain copies that agrees with the configuration and the routers of the MoE model."""
    if arch.num_experts:
        return growth_spec(arch, moe_arch.num_experts or 0, moe_arch.top_k, str(utility or ""))
    width, experts, top_k = moe_arch.expert_ffn_size or 1, moe_arch.num_experts or 0, moe_arch.top_k or 1
    granularity = arch.ffn_size // width
    if top_k == 1 and moe_arch.norm_topk:  # no spec makes this top-k; a larger top-k has the same sums
        experts, top_k = max(experts, 2 * granularity), granularity + 1
    return UpcycleSpec(
        num_experts=experts,
        top_k=top_k,
        granularity=granularity,
        shared_experts=0 if moe_arch.keeps_network else moe_arch.shared_ffn_size // width,
        router_init="zero" if routers and routers.zero else "normal",
        router_std=routers.std if routers else 0.02,
        router_order=moe_arch.router_kind.order,
        router_score=moe_arch.router_score,
        routed_scaling_factor=moe_arch.routed_scaling_factor,
    )


def _kind(plan: TensorPlan) -> str:
    mapping = plan.mapping
    if plan.is_router or mapping.role == "shared_gate" or not (mapping.is_expert or mapping.is_shared):
        return "router" if plan.is_router else "everything else"
    return f"{mapping.role.partition('_')[0]} {plan.parts[0]}"


def _pairs(
    dense: DenseSource, moe: DenseSource, name: str, plan: TensorPlan
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield the MoE model's rows in blocks, the dense rows in the same type, and the dense rows times all factors.

    Factors that cancel each other are also applied to the dense rows. The reason is that a very small value may lose
    its last bit if it is halved in Megatron and doubled again on export.
    """
    shape, dtype, row = moe.shape(name), moe.dtype(name), 0
    rows = max(1, _BLOCK_BYTES // max(1, torch.Size(shape[1:]).numel() * dtype.itemsize))
    for slice_ in plan.slices:
        (first, last), *rest = slice_.bounds
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            theirs = moe.read(name, [(row, row + stop - start), *((0, size) for size in shape[1:])])
            ours = plan.source(dense).read(slice_.name, [(start, stop), *rest])
            row += stop - start
            require_finite(theirs, name, moe)
            ours = (ours + plan.offset if plan.offset else ours).to(dtype)
            made = ours
            for factor in plan.factors:
                made = made * factor
            yield theirs, ours if plan.factor != 1.0 else made, made
            dense.release()
            moe.release()


def _relation(
    blocks: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], by_column: bool, expected: float
) -> tuple[float, float]:
    """Return the factor between two matrices, and the share of neurons (rows or columns) without this factor."""
    scale: float | None = None
    kept: list[torch.Tensor] = []
    for theirs, ours, made in blocks:
        axis = 0 if by_column else 1
        if scale in (None, expected) and torch.equal(theirs, made):  # the usual case, and many times faster
            scale, same = expected, torch.ones(theirs.shape[1 - axis if theirs.dim() > 1 else 0], dtype=torch.bool)
        else:
            scale = _factor(theirs, ours, expected) if scale is None else scale
            same = _same(theirs, ours, scale)
            same = same.all(axis) if same.dim() > 1 else same
        kept = [kept[0] & same] if by_column and kept else [*kept, same]
    whole = torch.cat(kept)
    return 1.0 if scale is None else scale, 1.0 - float(whole.double().mean())


def _same(theirs: torch.Tensor, ours: torch.Tensor, scale: float) -> torch.Tensor:
    """Return where `theirs` is `ours` times a factor: bit by bit if the factor is 1, otherwise up to two roundings."""
    if scale == 1.0:
        return theirs == ours
    scaled = ours.float() * scale
    limits = torch.finfo(ours.dtype)
    return (theirs.float() - scaled).abs() <= 1.01 * limits.eps * scaled.abs() + limits.tiny


def _factor(theirs: torch.Tensor, ours: torch.Tensor, expected: float) -> float:
    """Return the factor that explains the most values: 1, the expected factor, or the median of the ratios."""
    a, b = theirs.flatten()[: 1 << 20].float(), ours.flatten()[: 1 << 20].float()
    ratios = (a / b)[b != 0]
    candidates = [1.0, expected] + ([float(ratios.median())] if len(ratios) else [])
    return max(candidates, key=lambda scale: float(_same(theirs, ours, scale).double().mean()))
