"""The evaluation of one layout, and the search for the fastest layouts that fit."""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.planning.hardware import BRIDGE_SOFTWARE, DEFAULT_SOFTWARE, Gpu, known_machine
from nemo_upcycle.planning.layout import Layout, divisors
from nemo_upcycle.planning.memory import (
    GIB,
    Memory,
    checkpoint_bytes,
    least_bytes,
    least_with_activations,
    worst_memory,
)
from nemo_upcycle.planning.rules import check_layout, first_violation
from nemo_upcycle.planning.throughput import StepTime, ThroughputModel
from nemo_upcycle.planning.workload import PRECISIONS, Workload


#: Shares of a GPU's memory. A layout fits up to the first share, and is tight up to the second share. Fragmentation
#: may end the run of a tight layout.
FITS, TIGHT = 0.90, 0.97
_MICRO_BATCHES = (1, 2, 4)
_CONTEXTS = (1, 2, 4, 8, 16)
#: Largest tensor parallelism to search; above it, matrices get small.
_MOST_TP = 8
#: Largest number of GPUs; larger numbers are taken for mistakes.
MOST_GPUS = 1_000_000


@dataclass(frozen=True)
class PlanRequest:
    """A planning request: model, GPUs, the work of a step, and the settings to keep.

    Args:
        arch: the trained model's architecture.
        gpu: kind of the GPUs.
        gpus: number of GPUs.
        work: work of a step.
        tokens: tokens of the whole run.
        software: one of `hardware.SOFTWARE`.
        usual: settings (`dispatcher`, `overlap`) that are taken from NVIDIA's recipes instead of from `work`.
        grouped: whether the experts' products are grouped; if not, Megatron-Core cannot recompute only the experts'
            activation function.
        micro_batch: the only micro-batch to search (sequences); None to search several.
        recompute: the only kind of recomputation to use; None for the fastest kind that fits.
        price_per_gpu_hour: price in any currency; None if it is not known.

    Raises:
        SpecError: the GPU does not support the precision.
    """

    arch: Architecture
    gpu: Gpu
    gpus: int
    work: Workload
    tokens: float
    software: str = DEFAULT_SOFTWARE
    usual: tuple[str, ...] = ()
    grouped: bool = True
    micro_batch: int | None = None
    recompute: str | None = None
    price_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        if not self.gpu.has(self.work.numbers):
            able = [name for name, numbers in PRECISIONS.items() if self.gpu.has(numbers)]
            expected = f"{', '.join(able)} on {self.gpu.name}"
            raise SpecError(field="precision", got=self.work.precision, expected=expected, fix=f"use {able[-1]}")

    @cached_property
    def model(self) -> ThroughputModel:
        """The throughput model of the architecture on the requested GPUs."""
        return ThroughputModel(self.arch, self.gpu, known_machine(self.gpu, self.software))

    def plans(self, layout: Layout) -> list[LayoutEstimate]:
        """Return a layout's estimates, one for each allowed kind of recomputation."""
        return [LayoutEstimate(self, layout, self._work(layout, kind)) for kind in self.recomputes]

    def _work(self, layout: Layout, recompute: str) -> Workload:
        usual = {
            "dispatcher": usual_dispatcher(self.arch, self.gpu, layout, self.work),
            "overlap": usual_overlap(self.arch, self.gpu, layout, self.work, recompute, self.software),
        }
        return _changed(self.work, recompute, *(usual[name] if name in self.usual else None for name in usual))

    @property
    def room(self) -> float:
        """Largest memory of a rank at which a layout still runs (bytes)."""
        return self.gpu.memory_gib * TIGHT * GIB

    @property
    def recomputes(self) -> tuple[str, ...]:
        """The allowed kinds of recomputation. The first kind recomputes nothing; the last kind needs the least memory.

        Core attention is excluded: with flash attention, recomputing it costs more memory than keeping it.
        """
        if self.recompute:
            return (self.recompute,)
        if not self.arch.num_experts:
            return ("none", "mlp", "full")
        delayed, dense = self.work.precision == "fp8-delayed", ("mlp",) if self.arch.moe_pattern else ()
        light = () if delayed else ("layernorm", *(("moe_act", "layernorm,moe_act") if self.grouped else ()))
        heavy = ("moe",) if delayed else ("moe", "layernorm,moe")
        return ("none", *light, *dense, *heavy, "full")


@dataclass(frozen=True)
class LayoutEstimate:
    """An evaluated layout: its memory, speed and cost.

    Args:
        request: request that the layout answers.
        layout: the layout.
        work: work of a step, with the chosen recomputation.
    """

    request: PlanRequest
    layout: Layout
    work: Workload

    @cached_property
    def worst(self) -> tuple[int, Memory]:
        """The pipeline stage whose ranks use the most memory, and the memory of these ranks."""
        return worst_memory(self.request.arch, self.layout, self.work)

    @property
    def memory(self) -> Memory:
        """Memory of the fullest ranks."""
        return self.worst[1]

    @property
    def verdict(self) -> str:
        """How the layout fits into the GPU's memory: `fits`, `tight` or `no`."""
        share = self.memory.total / GIB / self.request.gpu.memory_gib
        return "fits" if share <= FITS else "tight" if share <= TIGHT else "no"

    @cached_property
    def time(self) -> StepTime:
        """Time of a step (seconds), by cause."""
        return self.request.model.step(self.layout, self.work)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Predicted throughput of a GPU (tokens per second)."""
        return self.work.global_batch * self.work.seq_length / self.time.total / self.request.gpus

    def tflops_per_gpu(self, *, causal: bool) -> float:
        """Return model TFLOP/s of a GPU for causal or full attention. Recomputation does not count."""
        flops = flops_per_token(self.request.arch, self.work.seq_length, causal=causal)
        return self.tokens_per_s_per_gpu * flops / 1e12

    @property
    def peak_tflops(self) -> float:
        """The peak that MFU is measured against: the GPU's peak for the precision of the products (TFLOP/s)."""
        return self.request.gpu.peak_tflops(self.work.numbers)

    @property
    def peak_of(self) -> str:
        """The precision that `peak_tflops` belongs to."""
        return {8: "FP8", 4: "FP4"}.get(self.work.numbers.bits, "BF16")

    @property
    def mfu(self) -> float:
        """Model FLOP/s divided by the peak. Attention is counted in full, as in the paper."""
        return self.tflops_per_gpu(causal=False) / self.peak_tflops

    @property
    def hours(self) -> float:
        """Duration of the run, without evaluation, checkpoints and failures (hours)."""
        return self.request.tokens / (self.tokens_per_s_per_gpu * self.request.gpus) / 3600

    @property
    def gpu_hours(self) -> float:
        """Duration of the run times the number of GPUs (GPU-hours)."""
        return self.hours * self.request.gpus

    @property
    def cost(self) -> float | None:
        """GPU-hours times the price of a GPU-hour; None if the price is not known."""
        price = self.request.price_per_gpu_hour
        return None if price is None else self.gpu_hours * price

    @property
    def checkpoint_gib(self) -> float:
        """Size of a checkpoint with optimizer states (GiB)."""
        return checkpoint_bytes(self.request.arch, self.work.lora) / GIB


@functools.lru_cache(maxsize=256)
def _changed(work: Workload, recompute: str, dispatcher: str | None, overlap: tuple[str, ...] | None) -> Workload:
    """Return a workload with changed settings; None keeps a setting. Equal changes return the same object."""
    given = {"dispatcher": dispatcher, "overlap": overlap}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(work, recompute=recompute, **changes)


def usual_dispatcher(arch: Architecture, gpu: Gpu, layout: Layout, work: Workload) -> str:
    """Return the dispatcher of NVIDIA's recipes: HybridEP on Blackwell if experts are spread without padding."""
    spread = arch.num_experts and layout.ep * layout.etp > 1 and not work.pad
    return "hybridep" if spread and gpu.is_blackwell else "alltoall"


def usual_overlap(
    arch: Architecture, gpu: Gpu, layout: Layout, work: Workload, recompute: str, software: str
) -> tuple[str, ...]:
    """List the overlaps of NVIDIA's recipes (`perf_recipes` of Megatron-Bridge 0.6.2, NeMo's `performance_mode`).

    - Dense models overlap tensor parallelism's traffic, except in FP4.
    - MoE models overlap the experts' traffic if it leaves the NVLink domain and Megatron-Core can hide it. To hide it,
      Megatron-Core needs interleaved stages or a single stage, and no Mamba layers, delta nets, padding, or
      recomputation of whole layers or MoE layers.
    - In MXFP8 and NVFP4 with the newest software, in NVLink racks and on single machines, MoE models overlap the
      experts' traffic if Megatron-Core can hide it. They also overlap launches, through one CUDA graph of a whole
      step.
    """
    if not arch.num_experts:
        return ("tp",) if layout.tp > 1 and work.numbers.bits > 4 else ()
    able = layout.ep > 1 and not (arch.mamba or arch.delta) and (layout.pp == 1 or layout.vp > 1) and not work.pad
    if not able or recompute == "full" or "moe" in recompute.split(","):
        return ()
    within = gpu.nvlink_gpus > gpu.per_node or layout.gpus <= gpu.nvlink_gpus
    if within and work.numbers.blackwell and software == BRIDGE_SOFTWARE:
        return ("ep", "launch")
    return ("ep",) if layout.ep * layout.etp > gpu.nvlink_gpus else ()


def evaluate_layout(request: PlanRequest, layout: Layout) -> LayoutEstimate:
    """Evaluate a layout with the fastest recomputation that fits.

    If no kind fits, use the fastest kind that is tight. If no kind is tight, use the kind that needs the least memory.

    Args:
        request: request to answer.
        layout: layout to check and evaluate.

    Raises:
        SpecError: the layout breaks a rule.
    """
    check_layout(layout, request.arch, request.work, request.software)
    plans = sorted(request.plans(layout), key=_speed)
    for verdict in ("fits", "tight"):
        for plan in plans:
            if plan.verdict == verdict:
                return plan
    return min(plans, key=lambda plan: plan.memory.total)


def search(request: PlanRequest, limit: int = 10) -> list[LayoutEstimate]:
    """Find the layouts that fit, fastest first. If none fits, find the layouts that need the least memory.

    Each layout has the recomputation that `evaluate_layout` chooses.

    Args:
        request: request to answer.
        limit: largest number of layouts to return.

    Raises:
        SpecError: no layout obeys the rules for this number of GPUs and this batch; the text names a change that
            helps.
    """
    if plans := find(request, limit):
        return plans
    batch = request.work.global_batch
    for other in _batches(batch, request.gpus * (request.micro_batch or 1)):
        if _fits(replace(request, work=replace(request.work, global_batch=other))):
            raise SpecError(
                field="global_batch",
                got=batch,
                expected=f"a batch size that some layout of {request.gpus} GPUs can use",
                fix=f"set <global_batch>={other}",
            )
    if gpus := nearest_gpus(request):
        raise SpecError(
            field="gpus",
            got=request.gpus,
            expected=f"a number of GPUs that can hold the model and share a batch of {batch}",
            fix=f"set <gpus>={gpus}",
        )
    # The plain layout must break a rule, because otherwise it would be among the plans. The error names the rule.
    plain = Layout(gpus=request.gpus, micro_batch=request.micro_batch or 1)
    check_layout(plain, request.arch, request.work, request.software)
    return plans


def nearest_gpus(request: PlanRequest) -> int | None:
    """Return the nearest other number of GPUs with which some layout fits; None if no number is found."""
    # Try multiples of a node. For many GPUs, the multiple is about an eighth of their number.
    step: int = max(request.gpu.per_node, 2 ** (request.gpus.bit_length() - 4))
    numbers = {2**n for n in range(20)} | {step * n for n in range(1, 2 * request.gpus // step + 2)}
    for gpus in sorted(numbers - {request.gpus}, key=lambda number: (abs(number - request.gpus), -number)):
        if gpus <= MOST_GPUS and _fits(replace(request, gpus=gpus)):
            return gpus
    return None


def _batches(batch: int, step: int) -> list[int]:
    """Return other batch sizes to try, nearest first: multiples of a step, or of its half, quarter or eighth."""
    parts = [step // 2**n for n in range(4) if step % 2**n == 0]
    around = {part * count for part in parts for count in (batch // part, batch // part + 1)}
    return sorted(around - {0, batch}, key=lambda other: abs(other - batch))


def _fits(request: PlanRequest) -> bool:
    """Return whether some layout fits; only the layouts that need the least memory are tried."""
    smallest = _smallest(request, layouts(request), 20)
    able = (layout for layout in smallest if _least(request, layout) <= request.room)
    return any(request.plans(layout)[-1].verdict != "no" for layout in able)


def _smallest(request: PlanRequest, every: Iterable[Layout], count: int) -> list[Layout]:
    return heapq.nsmallest(count, every, key=lambda layout: _least(request, layout))


def find(request: PlanRequest, limit: int) -> list[LayoutEstimate]:
    """Find layouts as `search` does, but return an empty list if `search` would raise an error."""
    every = list(layouts(request))
    kinds = [request.plans(layout) for layout in every if _least(request, layout) <= request.room]
    chosen: dict[int, LayoutEstimate] = {}
    # Fastest first. Try each layout without recomputation; if it does not fit, try every kind of recomputation.
    queue = [(*_speed(plans[0]), number, 0) for number, plans in enumerate(kinds)]
    heapq.heapify(queue)
    while queue and len(chosen) < limit:
        *_, number, kind = heapq.heappop(queue)
        plans = kinds[number]
        plan = plans[kind]
        could_fit = least_with_activations(request.arch, plan.layout, plan.work) <= request.room
        able_to_run = number not in chosen and could_fit and plan.verdict != "no"
        # If a kind is only tight and a slower kind of the same layout fits, skip the tight kind.
        if able_to_run and (plan.verdict == "fits" or not any(other.verdict == "fits" for other in plans)):
            chosen[number] = plan
        elif kind == 0:
            for other in range(1, len(plans)):
                heapq.heappush(queue, (*_speed(plans[other]), number, other))
    if chosen:
        return list(chosen.values())
    nearest = (request.plans(layout)[-1] for layout in _smallest(request, every, 50))
    return sorted(nearest, key=lambda plan: plan.memory.total)[:limit]


def _speed(plan: LayoutEstimate) -> tuple[float, int]:
    """Return the sort key of a plan: the shorter time first, then the smaller context parallelism."""
    return plan.time.total, plan.layout.cp


def layouts(request: PlanRequest) -> Iterator[Layout]:
    """Yield every valid layout with equal pipeline stages; tensor parallelism stays within NVLink.

    Newer releases of Megatron-Core let ranks share a key-value head. The speed of sharing was not measured, so layouts
    that share a head are omitted.
    """
    arch, node = request.arch, min(_MOST_TP, request.gpu.nvlink_gpus)
    micro_batches = _MICRO_BATCHES if request.micro_batch is None else (request.micro_batch,)
    experts = divisors(arch.num_experts) if arch.num_experts else [1]
    for tp, cp, pp, ep in itertools.product(divisors(node), _CONTEXTS, divisors(arch.num_layers), experts):
        if request.gpus % (tp * cp * pp) or request.gpus % (ep * pp) or arch.num_kv_heads % tp:
            continue
        for etp in {1, tp} if ep > 1 else {tp}:
            # Context parallelism cuts the memory that a larger micro-batch adds, so combining both gains nothing.
            micros = micro_batches[:1] if cp > 1 else micro_batches
            chunks = divisors(arch.num_layers // pp) if pp > 1 else [1]
            for vp, micro in itertools.product(chunks, micros):
                layout = Layout(gpus=request.gpus, tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, etp=etp, micro_batch=micro)
                if first_violation(layout, request.arch, request.work, request.software) is None:
                    yield layout


def _least(request: PlanRequest, layout: Layout) -> float:
    return least_bytes(request.arch, layout, request.work)
