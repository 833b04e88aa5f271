"""What a rank has to hold, by component: states exactly, activations by formula, the rest as stated assumptions.

Activations follow Korthikanti et al. (arXiv 2205.05198, section 4): each layer's saved tensors, cut by tensor and
sequence parallelism, times the micro-batches in flight; with flash attention (no s x s matrix), RMSNorm, gated units
and no dropout, and with the token slots that a rank's experts are given in place of the feed-forward network's tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.parameters import stage_plan
from nemo_upcycle.planning.workload import Workload


GIB = 2**30
#: Bytes of CUDA context, cuBLAS and allocator slack that PyTorch's own counters do not show. Assumed, not measured.
CONTEXT_BYTES = int(1.5 * GIB)
#: Bytes of NCCL's buffers for one group of more than one rank. Assumed, not measured.
GROUP_BYTES = int(0.25 * GIB)
#: Bytes for one logit of the last stage: bf16, float32, and the exponentials that the loss keeps.
LOGIT_BYTES = 10

ASSUMPTIONS = (
    "weights, gradients, optimizer: exactly Megatron-Core's buffers (bf16; --grad-dtype; float32 masters and moments)",
    "activations: saved tensors of a layer x micro-batches in flight (arXiv 2205.05198), flash attention, no dropout",
    "routed: token slots at the capacity factor, else at --imbalance times the mean, at most every token once",
    "workspace: what is recomputed of one layer, and its gradients",
    "context: 1.5 GiB for CUDA, cuBLAS and allocator slack, 0.25 GiB for every NCCL group",
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by component."""

    weights: int
    gradients: int
    optimizer: int
    fp8_copies: int
    activations: int
    routed: int
    logits: int
    workspace: int
    context: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def states(self) -> int:
        """What stays from step to step: PyTorch's `memory_allocated` after a step."""
        return self.weights + self.gradients + self.optimizer + self.fp8_copies

    @property
    def peak(self) -> int:
        """PyTorch's `max_memory_allocated`, which knows neither CUDA's context nor NCCL's buffers."""
        return self.total - self.context

    def gib(self) -> dict[str, float]:
        """Return the components and their sum in GiB."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)} | {"total": self.total}
        return {name: round(value / GIB, 3) for name, value in parts.items()}


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps of one micro-batch for its backward pass.

    Args:
        plain: bytes of everything but the token slots of routed experts.
        routed: bytes of those.
        working: bytes that exist only while the layer runs: its recomputed tensors and their gradients.
    """

    plain: float
    routed: float
    working: float


def layer_bytes(
    arch: Architecture, layout: Layout, work: Workload, moe: bool, fp8: bool, parts: str = "*-"
) -> LayerBytes:
    """Return what one layer keeps of one micro-batch.

    Elements for each token of a rank's part of the sequence (s / cp): inputs and outputs of two norms, 4 D; query,
    key, value and the attention's output, (2 H + 2 R) K; all of it over tp. Latent attention keeps its narrow tensors
    besides, twice; a Mamba mixer its inputs and outputs. A dense network adds (2 F + F) / tp, an MoE layer
    (2 F + F) / etp for every token slot, the experts' input, D a slot, and 16 bytes for each of the router's
    logits. In FP8 the inputs of linear layers take one byte, all others two.

    Args:
        arch: the model's architecture.
        layout: the cluster's.
        work: what a step works on.
        moe: whether the layer has experts.
        fp8: whether its linear layers multiply in FP8.
        parts: what it consists of, as `Architecture.parts` says.
    """
    tokens = work.seq_length // layout.cp * layout.micro_batch
    saved = work.numbers.saved_bytes if fp8 else 2
    width, gates = arch.hidden_size, 2 if arch.gated else 1
    attention = statistics = norm = network = routed = act = 0.0
    if "*" in parts:
        attention = tokens * (2 * width + _attention_bytes(arch, work, saved, fp8))
        statistics = tokens * 4 * arch.num_heads  # of attention's softmax
    if "M" in parts and arch.mamba:
        # The norm; what the input projection, the convolution with the scan, the inner norm and the output keep.
        inner = arch.mamba.rows("x")
        rows = 2 * inner + sum(arch.mamba.rows(part) for part in ("B", "C", "dt"))
        attention = tokens * (2 * width + saved * width + 2 * rows + 4 * inner + saved * inner)
    if "-" in parts:
        norm = tokens * (2 * width + (2 if moe else saved) * width)  # the router keeps its input in BF16
    if moe:
        # As many slots as the rank's own tokens have, from all over its group; etp ranks gather theirs.
        slots = tokens / layout.tp * work.buffer_slots_per_token(arch, layout.ep) * layout.etp
        neurons = (arch.expert_ffn_size or 0) / layout.etp
        act = slots * saved * neurons
        routed = slots * (saved * arch.expert_width + 2 * gates * neurons) + act
        network = tokens * saved * (arch.expert_input_size or 0)
        network += tokens * (gates * 2 + saved) * arch.shared_ffn_size + tokens * 16 * (arch.num_experts or 0)
    elif "-" in parts:
        network = tokens * (gates * 2 + saved) * arch.ffn_size
    every = attention + statistics + norm + network
    freed = statistics if work.recomputes("core_attn") else 0.0  # flash attention keeps no scores
    if arch.latent and "*" in parts and work.recomputes("mla_up_proj"):  # query, key and value
        freed += tokens * 2 * arch.num_heads * (2 * arch.head_dim + arch.value_dim)
    if moe and work.recomputes("layernorm"):  # Transformer Engine's other norms are one with a linear layer
        freed += tokens * 2 * width
    freed_routed = act if work.recomputes("moe_act") else 0.0
    if work.recomputes("moe" if moe else "mlp"):
        freed, freed_routed = freed + network, routed
    if work.recompute == "full":
        freed, freed_routed = every - tokens * 2 * width, routed
    # Gradients of a layer's largest tensors live beside them: of its network, and of attention, never both.
    gradients = max((attention + statistics) / layout.tp, routed + network / layout.tp)
    working = freed / layout.tp + freed_routed + gradients
    return LayerBytes((every - freed) / layout.tp, routed - freed_routed, working)


def _attention_bytes(arch: Architecture, work: Workload, saved: float, fp8: bool) -> float:
    """Return the bytes that attention keeps of a token, without its norm's input and its softmax."""
    heads, groups = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    values, out = arch.num_kv_heads * arch.value_dim, arch.num_heads * arch.value_dim
    count = saved * arch.hidden_size + 2 * (heads + groups + values) + 2 * out
    if arch.latent:
        count += (2 + saved) * ((arch.latent.query_rank or 0) + arch.latent.kv_rank)
    if arch.qk_norm:
        count += 2 * (heads + groups)  # norms keep their input
    if work.precision == "fp8-delayed" and fp8:
        count += out  # the output layer keeps its input in FP8; else attention's own output serves both
    return count


def in_flight(layout: Layout, work: Workload, stage: int) -> list[int]:
    """Return for each chunk of a stage the micro-batches it keeps at the peak.

    1F1B keeps pp - stage of them. Interleaved, a stage has warmed up with 2 (pp - stage - 1) + (vp - 1) pp chunks and
    works on one more; chunks take turns every pp micro-batches, so the first ones are the fullest.
    """
    count = layout.micro_batches(work.global_batch)
    if layout.vp == 1:
        return [min(layout.pp - stage, count)]
    total = min(2 * (layout.pp - stage - 1) + (layout.vp - 1) * layout.pp + 1, count * layout.vp)
    held = [0] * layout.vp
    for turn in range(total):
        held[turn // layout.pp % layout.vp] += 1
    return held


def activation_bytes(arch: Architecture, layout: Layout, work: Workload, stage: int) -> tuple[float, float, float]:
    """Return what a stage's ranks keep at the peak, in bytes: plain, of routed experts, of the layer that runs."""
    counts: Counter[tuple[bool, bool, str]] = Counter()
    for chunk, count in zip(layout.chunks(arch, stage), in_flight(layout, work, stage), strict=True):
        for layer in chunk.layers:
            counts[arch.is_moe_layer(layer), work.is_fp8_layer(arch, layer), arch.parts(layer)] += count
        if arch.mtp_layers and chunk.has_output:
            fp8 = work.is_fp8_layer(arch, arch.num_layers - 1)
            counts[bool(arch.num_experts), fp8, "*-"] += arch.mtp_layers * count
    held = {kind: layer_bytes(arch, layout, work, *kind) for kind in counts}
    return (
        sum(count * held[kind].plain for kind, count in counts.items()),
        sum(count * held[kind].routed for kind, count in counts.items()),
        max((layer.working for layer in held.values()), default=0.0),
    )


def stage_memory(arch: Architecture, layout: Layout, work: Workload, stage: int) -> Memory:
    """Return what the ranks of a pipeline stage hold; where they differ (by padding only), the fullest."""
    states = stage_plan(arch, layout, replace(work, recompute="none", overlap=()), stage)  # neither changes a state
    plain, routed, working = activation_bytes(arch, layout, work, stage)
    tokens = work.seq_length // layout.cp * layout.micro_batch
    logits = tokens * layout.padded_vocab(arch) // layout.tp * LOGIT_BYTES
    group_sizes = (layout.tp, layout.pp, layout.cp, layout.ep, layout.etp, layout.dense_shards, layout.expert_dp)
    return Memory(
        weights=states.weights_bytes,
        gradients=states.gradients_bytes,
        optimizer=states.optimizer_bytes(),
        fp8_copies=states.fp8_bytes,
        activations=round(plain),
        routed=round(routed),
        logits=logits * (1 + arch.mtp_layers) if stage == layout.pp - 1 else 0,
        workspace=round(working),
        context=CONTEXT_BYTES + GROUP_BYTES * sum(size > 1 for size in group_sizes),
    )


def worst_memory(arch: Architecture, layout: Layout, work: Workload) -> tuple[int, Memory]:
    """Return the pipeline stage whose ranks hold most, and what they hold."""
    # Of equal stages the first keeps most micro-batches and the last the logits.
    stages: Iterable[int] = {0, 1, layout.pp - 1}
    if layout.first or layout.last or arch.moe_pattern or arch.mamba:
        firsts = {_contents(arch, layout, work, stage): stage for stage in reversed(range(layout.pp))}
        stages = firsts.values()
    memories = [(stage, stage_memory(arch, layout, work, stage)) for stage in stages if stage < layout.pp]
    return max(memories, key=lambda pair: pair[1].total)


def _contents(arch: Architecture, layout: Layout, work: Workload, stage: int) -> tuple[object, ...]:
    """Return what stages have in common whose ranks hold the same states."""
    return tuple(
        (
            chunk.has_embedding,
            chunk.has_output,
            *((arch.is_moe_layer(n), work.is_fp8_layer(arch, n), arch.parts(n)) for n in chunk.layers),
        )
        for chunk in layout.chunks(arch, stage)
    )
