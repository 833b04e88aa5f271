"""What is trained with a layout: batch, sequence, precision, recomputation, capacity of the experts."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture


@dataclass(frozen=True)
class Precision:
    """How numbers are kept; parameters always in BF16.

    Args:
        fp8: whether the linear layers inside the transformer layers multiply in FP8.
        copy_bytes: bytes of the FP8 copies that Transformer Engine holds beside each of their weights.
        saved_bytes: of one element of an input that such a layer keeps for its backward pass.
        bf16_ends: layers at either end of the model that stay in BF16.
    """

    fp8: bool = False
    copy_bytes: int = 0
    saved_bytes: int = 2
    bf16_ends: int = 0


#: As the recipes set them: NeMo's mixed-precision factories, but with parameters in BF16 (a run that starts by
#: upcycling cannot have `fp8_param_gather`). Current scaling leaves the first and the last layer in BF16.
PRECISIONS = {
    "bf16": Precision(),
    "fp8-delayed": Precision(fp8=True, copy_bytes=2, saved_bytes=1),
    "fp8-current": Precision(fp8=True, copy_bytes=2, saved_bytes=1, bf16_ends=1),
    "fp8-blockwise": Precision(fp8=True, copy_bytes=2, saved_bytes=1),
}
#: From keeping everything to keeping the input of each layer only: nothing, the experts' activation function,
#: the whole MoE layer (or feed-forward network), the whole layer.
RECOMPUTES = ("none", "moe_act", "moe", "full")
#: Larger numbers are taken for mistakes.
_MOST = 10**9
#: What sends tokens to their experts: a message for each expert of a token, or for each place that has experts of it.
#: HybridEP is in Megatron-Core from 0.16 on, so not in NeMo 2.7.
DISPATCHERS = ("alltoall", "deepep", "hybridep")
#: Who chooses the experts: benchmarks make the router balance them (`moe_router_force_load_balancing`), training does
#: not.
ROUTINGS = ("balanced", "natural")
#: Tensor parallelism's traffic beside the products it belongs to (`tp_comm_overlap`), and the experts' beside another
#: micro-batch (Megatron-Core's `overlap_moe_expert_parallel_comm`, not in NeMo 2.7). The recipes have neither.
OVERLAPS = ("tp", "ep")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a step works on.

    Args:
        seq_length: tokens of a sequence.
        global_batch: sequences of a step.
        capacity_factor: an expert takes at most this many times its even share of the token slots, the rest is
            dropped (`moe_expert_capacity_factor`); None drops nothing.
        pad: whether every expert is padded up to its capacity (`moe_pad_expert_input_to_capacity`).
        imbalance: token slots of the busiest rank over the mean, for the memory of experts that drop nothing.
        precision: one of `PRECISIONS`.
        recompute: one of `RECOMPUTES`.
        dispatcher: one of `DISPATCHERS`.
        routing: one of `ROUTINGS`, for the time.
        overlap: whose traffic runs beside computation, of `OVERLAPS`.

    Raises:
        SpecError: a value is out of range or unknown.
    """

    seq_length: int
    global_batch: int
    capacity_factor: float | None = None
    pad: bool = False
    imbalance: float = 1.5
    precision: str = "bf16"
    recompute: str = "none"
    dispatcher: str = "alltoall"
    routing: str = "balanced"
    overlap: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = {"precision": PRECISIONS, "recompute": RECOMPUTES, "dispatcher": DISPATCHERS, "routing": ROUTINGS}
        for name, valid in names.items():
            if getattr(self, name) not in valid:
                raise SpecError.unknown(name, getattr(self, name), valid)
        if others := [name for name in self.overlap if name not in OVERLAPS]:
            raise SpecError.unknown("overlap", others[0], OVERLAPS)
        if self.pad and self.dispatcher != "alltoall":
            raise SpecError(
                field="dispatcher",
                got=f"{self.dispatcher} with padding",
                expected="alltoall",
                fix="plan without padding, or set <dispatcher>=alltoall",
            )
        if self.recompute == "moe_act" and self.precision == "fp8-delayed":
            raise SpecError(
                field="recompute",
                got=f"moe_act with {self.precision}",
                expected="another kind: Megatron-Core recomputes no activation under delayed scaling",
                fix="set <recompute>=moe",
            )
        for name, low in (("seq_length", 1), ("global_batch", 1), ("capacity_factor", 0.01), ("imbalance", 1.0)):
            if (value := getattr(self, name)) is not None and not low <= value <= _MOST:
                fix = f"set <{name}> within the range"
                raise SpecError(field=name, got=value, expected=f"{low} to {_MOST:,}", fix=fix)

    @property
    def numbers(self) -> Precision:
        """How numbers are kept."""
        return PRECISIONS[self.precision]

    def is_fp8_layer(self, arch: Architecture, layer: int) -> bool:
        """Return whether the linear layers of a transformer layer multiply in FP8."""
        ends = self.numbers.bf16_ends
        return self.numbers.fp8 and ends <= layer < arch.num_layers - ends

    def slots_per_token(self, arch: Architecture) -> float:
        """Return the token slots that a balanced expert rank works on for each token, without the dropped ones."""
        share = self.capacity_factor if self.capacity_factor is not None else 1.0
        return (arch.top_k or 0) * (share if self.pad else min(share, 1.0))

    def buffer_slots_per_token(self, arch: Architecture, ep: int) -> float:
        """Return the token slots that the busiest rank of `ep` has to hold for each of its tokens.

        With all experts on every rank nothing is uneven; else it holds at most every token of the group once for each
        of its experts.
        """
        capacity = self.capacity_factor if self.capacity_factor is not None else float("inf")
        share = capacity if self.pad else min(capacity, self.imbalance if ep > 1 else 1.0)
        return min((arch.top_k or 0) * share, float(arch.num_experts or 0))
