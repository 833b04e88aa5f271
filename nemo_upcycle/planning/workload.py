"""The workload that a layout is planned for: batch, sequence, precision, recomputation, capacity of the experts."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture


@dataclass(frozen=True)
class Precision:
    """A precision of training; parameters are in BF16, unless `Workload.low_params` is set.

    Args:
        bits: width of the numbers that linear layers inside the transformer layers multiply: 16, 8 or 4.
        copy_bytes: size of Transformer Engine's copies of such a layer's weight, by rows and by columns, including
            scales (bytes per element).
        saved_bytes: size of the input that such a layer keeps for the backward pass (bytes per element).
        cast_bytes: traffic to cast an input or a gradient by rows and by columns (bytes per element); 0 for delayed,
            current and blockwise scaling, because `Machine.gemm_fp8` includes their casts.
        gather_bytes: size of a low-precision parameter that data parallelism gathers (bytes).
        bf16_ends: number of layers at each end of the model that stay in BF16.
        rows: number that must divide a product's rows and columns.
        blackwell: whether only Blackwell supports the precision.
    """

    bits: int = 16
    copy_bytes: float = 0
    saved_bytes: float = 2
    cast_bytes: float = 0
    gather_bytes: float = 2
    bf16_ends: int = 0
    rows: int = 16
    blackwell: bool = False

    @property
    def fp8(self) -> bool:
        """Whether linear layers multiply in less than 16 bits."""
        return self.bits < 16


#: Precisions as the recipes set them, with NeMo's mixed-precision factories. Current scaling keeps the first and the
#: last layer in BF16. MXFP8 has a scale of one byte for every 32 numbers of a row and of a column, NVFP4 for every 16.
PRECISIONS = {
    "bf16": Precision(),
    "fp8-delayed": Precision(8, copy_bytes=2, saved_bytes=1, gather_bytes=1),
    "fp8-current": Precision(8, copy_bytes=2, saved_bytes=1, gather_bytes=1, bf16_ends=1),
    "fp8-blockwise": Precision(8, copy_bytes=2, saved_bytes=1, gather_bytes=1),
    "mxfp8": Precision(8, 2 * 33 / 32, 33 / 32, cast_bytes=2 + 2 * 33 / 32, rows=32, blackwell=True),
    "nvfp4": Precision(4, 2 * 9 / 16, 9 / 16, cast_bytes=2 + 2 * 9 / 16, blackwell=True),
}
#: Bytes of a gradient, by the type in which data parallelism sums gradients (`grad_reduce_in_fp32`).
GRADIENTS = {"fp32": 4, "bf16": 2}
#: `adam` has Megatron's distributed optimizer. `muon` keeps all states on every rank; `dist_muon` spreads the states
#: over ranks.
OPTIMIZERS = ("adam", "muon", "dist_muon")
#: Modules that can be recomputed in the backward pass, by Megatron-Core's names: the norm before the experts, core
#: attention, the experts' activation function, the network of a dense layer, the network of an MoE layer. `full` in
#: `RECOMPUTES` recomputes whole layers.
MODULES = ("layernorm", "core_attn", "moe_act", "mlp", "moe")
RECOMPUTES = ("none", *MODULES, "full")
#: Largest value of a setting; larger values are taken for mistakes.
_MOST = 10**9
#: Dispatchers of tokens. `alltoall` sends a message for each expert of a token. The other dispatchers send a message
#: for each rank or node that has experts of the token. HybridEP needs Megatron-Core 0.16, and NCCL EP needs 0.19, so
#: NeMo 2.7 has neither.
DISPATCHERS = ("alltoall", "deepep", "hybridep", "ncclep")
#: Routing of tokens: benchmarks force the router to balance the experts (`moe_router_force_load_balancing`), training
#: does not.
ROUTINGS = ("balanced", "natural")
#: Token slots of the busiest rank divided by the mean, for estimates of memory: with forced balance, and without.
FORCED_IMBALANCE, USUAL_IMBALANCE = 1.11, 1.5
#: Work that can overlap with computation: tensor parallelism's traffic with its products (`tp_comm_overlap`), the
#: experts' traffic with another micro-batch (`overlap_moe_expert_parallel_comm`, not in NeMo 2.7), and the host's
#: launches, if one CUDA graph contains a whole step (`cuda_graph_impl=full_iteration`). Most of this package's recipes
#: use none of these overlaps.
OVERLAPS = ("tp", "ep", "launch")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of a training step, and the settings that decide its cost.

    Args:
        seq_length: tokens of a sequence.
        global_batch: sequences of a step.
        capacity_factor: largest number of token slots of an expert, as a multiple of a balanced share; further tokens
            are dropped (`moe_expert_capacity_factor`). If None, no token is dropped.
        pad: whether every expert is padded up to its capacity (`moe_pad_expert_input_to_capacity`).
        imbalance: token slots of the busiest rank divided by the mean, for the memory if no token is dropped.
        precision: one of `PRECISIONS`.
        low_params: whether layers that multiply in FP8 or FP4 keep their parameters in that precision
            (`fp8_param_gather`), without a BF16 copy.
        gradients: one of `GRADIENTS`.
        optimizer: one of `OPTIMIZERS`; it changes only the memory.
        recompute: one of `RECOMPUTES`, or several of `MODULES` separated by commas.
        dispatcher: one of `DISPATCHERS`.
        routing: one of `ROUTINGS`; it changes only the time.
        overlap: work that overlaps with computation, some of `OVERLAPS`.
        lora: rank of the LoRA adapters (each expert has its own), which are trained together with the routers; 0 if
            all weights are trained.

    Raises:
        SpecError: a value is out of range or unknown.
    """

    seq_length: int
    global_batch: int
    capacity_factor: float | None = None
    pad: bool = False
    imbalance: float = USUAL_IMBALANCE
    precision: str = "bf16"
    low_params: bool = False
    gradients: str = "fp32"
    optimizer: str = "adam"
    recompute: str = "none"
    dispatcher: str = "alltoall"
    routing: str = "balanced"
    overlap: tuple[str, ...] = ()
    lora: int = 0

    def __post_init__(self) -> None:
        names: dict[str, Collection[str]] = {
            "precision": PRECISIONS,
            "gradients": GRADIENTS,
            "optimizer": OPTIMIZERS,
            "dispatcher": DISPATCHERS,
            "routing": ROUTINGS,
        }
        for name, valid in names.items():
            if getattr(self, name) not in valid:
                raise SpecError.unknown(name, getattr(self, name), valid)
        modules = self.recompute.split(",")
        kinds = RECOMPUTES if len(modules) == 1 else MODULES
        for module in modules:
            if module not in kinds:
                raise SpecError.unknown("recompute", module, kinds)
        if others := [name for name in self.overlap if name not in OVERLAPS]:
            raise SpecError.unknown("overlap", others[0], OVERLAPS)
        if self.pad and self.dispatcher != "alltoall":
            raise SpecError(
                field="dispatcher",
                kind="refused",
                got=f"{self.dispatcher} cannot pad experts to their capacity",
                fix="plan without padding, or set <dispatcher>=alltoall",
            )
        if self.precision == "fp8-delayed" and (refused := {"moe_act", "layernorm"} & {*modules}):
            raise SpecError(
                field="recompute",
                kind="refused",
                got=(
                    f"{min(refused)} cannot be combined with {self.precision}: Megatron-Core recomputes neither "
                    "moe_act nor layernorm under delayed scaling"
                ),
                fix="set <recompute>=moe",
            )
        for name, low in (("seq_length", 1), ("global_batch", 1), ("capacity_factor", 0.01), ("imbalance", 1.0)):
            if (value := getattr(self, name)) is not None and not low <= value <= _MOST:
                fix = f"set <{name}> within the range"
                raise SpecError(field=name, got=value, expected=f"{low} to {_MOST:,}", fix=fix)

    @property
    def numbers(self) -> Precision:
        """The `Precision` that `precision` names."""
        return PRECISIONS[self.precision]

    @property
    def gradient_bytes(self) -> int:
        """Size of a gradient in the buffers that data parallelism sums (bytes)."""
        return GRADIENTS[self.gradients]

    def recomputes(self, module: str) -> bool:
        """Return whether a module of `MODULES` is recomputed on its own, not as part of a whole layer."""
        return module in self.recompute.split(",")

    def is_fp8_layer(self, arch: Architecture, layer: int) -> bool:
        """Return whether the linear layers of a transformer layer multiply in FP8."""
        ends = self.numbers.bf16_ends
        return self.numbers.fp8 and ends <= layer < arch.num_layers - ends

    def slots_per_token(self, arch: Architecture) -> float:
        """Return the token slots per token that a balanced expert rank computes, without dropped slots."""
        share = self.capacity_factor if self.capacity_factor is not None else 1.0
        return (arch.top_k or 0) * (share if self.pad else min(share, 1.0))

    def buffer_slots_per_token(self, arch: Architecture, ep: int) -> float:
        """Return the token slots per token that the busiest of `ep` ranks must hold.

        If every rank has all experts, the load is even. Otherwise a rank holds at most all tokens of the group, once
        for each of the rank's experts.
        """
        capacity = self.capacity_factor if self.capacity_factor is not None else float("inf")
        share = capacity if self.pad else min(capacity, self.imbalance if ep > 1 else 1.0)
        return min((arch.top_k or 0) * share, float(arch.num_experts or 0))


class LayerKind(NamedTuple):
    """The properties that a layer's time depends on: experts, FP8, parts (`Architecture.parts`), attention window."""

    moe: bool
    fp8: bool
    parts: str
    window: int | None


@functools.lru_cache(maxsize=64)
def layer_kinds(arch: Architecture, work: Workload) -> Counter[LayerKind]:
    """Return the number of layers of each kind."""
    layers = range(arch.num_layers)
    return Counter(
        LayerKind(arch.is_moe_layer(n), work.is_fp8_layer(arch, n), arch.parts(n), arch.window_of(n)) for n in layers
    )
