"""Estimate the memory of a rank: states exactly, activations by a formula, everything else by stated assumptions.

Activations follow Korthikanti et al. (arXiv 2205.05198, section 4): each layer's saved tensors, cut by tensor and
sequence parallelism, times the micro-batches in flight. Flash attention (no s x s matrix), RMSNorm, gated units and no
dropout are assumed. The formula counts tokens for a dense network, and received token slots for experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.parameters import MUON_BYTES, OPTIMIZER_BYTES, WEIGHT_BYTES, average_params, stage_buffers
from nemo_upcycle.planning.workload import Workload


GIB = 2**30
#: Bytes of CUDA context, cuBLAS and allocator slack, which PyTorch's counters do not show. Assumed, not measured.
CONTEXT_BYTES = int(1.5 * GIB)
#: Bytes of NCCL's buffers for each group of more than one rank. Assumed, not measured.
GROUP_BYTES = int(0.25 * GIB)
#: Bytes for each logit of the last stage: bf16, float32, and the exponentials that the loss keeps.
LOGIT_BYTES = 10

ASSUMPTIONS = (
    "weights, gradients, optimizer: Megatron-Core's own buffers (bf16; --grad-dtype; float32 masters and moments)",
    "activations: saved tensors of a layer x micro-batches in flight (arXiv 2205.05198), flash attention, no dropout",
    (
        "routed: token slots at the capacity factor, or without one at --imbalance times the mean, at most every "
        "token once"
    ),
    "workspace: recomputed tensors of one layer, and their gradients",
    "context: 1.5 GiB for CUDA, cuBLAS and allocator slack, 0.25 GiB for every NCCL group",
)


@dataclass(frozen=True)
class Memory:
    """The memory of one rank by component (bytes)."""

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
        """Sum of all components."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def states(self) -> int:
        """The memory that stays from step to step: PyTorch's `memory_allocated` after a step."""
        return self.weights + self.gradients + self.optimizer + self.fp8_copies

    @property
    def peak(self) -> int:
        """PyTorch's `max_memory_allocated`, which includes neither CUDA's context nor NCCL's buffers."""
        return self.total - self.context

    def gib(self) -> dict[str, float]:
        """Return the components and their sum in GiB."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)} | {"total": self.total}
        return {name: round(value / GIB, 3) for name, value in parts.items()}


#: Terms of a layer that count the token slots of routed experts.
ROUTED = ("expert input", "expert fc1 output", "expert fc2 input")


@dataclass(frozen=True)
class LayerBytes:
    """The activations of one layer and one micro-batch (bytes).

    Args:
        kept: tensor, or module that needs a tensor -> bytes kept for the backward pass.
        working: bytes that exist only while the layer runs: recomputed tensors and their gradients.
    """

    kept: dict[str, float]
    working: float

    @property
    def plain(self) -> float:
        """Bytes of all terms except the token slots of routed experts."""
        return sum(value for term, value in self.kept.items() if term not in ROUTED)

    @property
    def routed(self) -> float:
        """Bytes of the token slots of routed experts."""
        return sum(value for term, value in self.kept.items() if term in ROUTED)


def layer_bytes(
    arch: Architecture, layout: Layout, work: Workload, moe: bool, fp8: bool, parts: str = "*-"
) -> LayerBytes:
    """Sum up the activations that one layer keeps for one micro-batch.

    The layer keeps these elements for each token of a rank's part of the sequence (s / cp):

    - Norms: inputs and outputs of two norms, 4 D / tp.
    - Attention: query, key, value and output, (2 H + 2 R) K / tp. A Mamba mixer keeps its inputs and outputs instead.
    - Dense network: (2 F + F) / tp.
    - MoE layer: (2 F + F) / etp and the experts' input, D, for every token slot; 16 bytes for each of the router's
      logits. Of these 16 bytes, 8 are for the order of the slots.

    In FP8 the inputs of linear layers take one byte, all other elements two.

    Args:
        arch: the model's architecture.
        layout: the parallel sizes.
        work: work of a step.
        moe: whether the layer has experts.
        fp8: whether the layer's linear layers multiply in FP8.
        parts: parts of the layer, see `Architecture.parts`.
    """
    tokens = work.seq_length // layout.cp * layout.micro_batch / layout.tp
    saved = work.numbers.saved_bytes if fp8 else 2
    width, gates = arch.hidden_size, 2 if arch.gated else 1
    attention, norm, network = {}, {}, {}
    if "*" in parts:
        attention = {term: tokens * size for term, size in _attention_bytes(arch, work, saved, fp8, layout.tp).items()}
    if "M" in parts and arch.mamba:
        # The input projection, the convolution with the scan, the inner norm and the output projection keep tensors.
        inner = arch.mamba.rows("x")
        rows = 2 * inner + sum(arch.mamba.rows(part) for part in ("B", "C", "dt"))
        attention = {
            "attention norm": tokens * 2 * width,
            "mamba": tokens * (saved * width + 2 * rows + 4 * inner + saved * inner),
        }
    if "G" in parts and arch.delta:
        # The input projection, the convolution, the norms of query and key, the delta rule (with one inverse per
        # chunk), the gated norm and the output projection keep tensors.
        net, value = arch.delta, arch.delta.rows("value")
        mixed = 2 * net.rows("key") + value
        spread = 2 * net.num_value_heads * net.key_dim  # query and key, repeated for each value head
        attention = {
            "attention norm": tokens * 2 * width,
            "delta net": tokens
            * (
                saved * width
                + 2 * (2 * mixed + value + 2 * net.num_value_heads)
                + 2 * (spread + net.num_value_heads * net.chunk_size + 2 * value)
                + saved * value
            ),
        }
    # Experts have fused kernels for two gated activations, and for the squared ReLU in NVIDIA's recipes of models with
    # Mamba layers. Without a fused kernel, both factors are kept a second time, and the unweighted product is kept
    # too.
    is_fused = arch.mamba or (arch.gated and arch.activation in ("silu", "quick_gelu"))
    unfused = 2 if arch.num_experts and not is_fused else 0
    before_fc2 = 2 * gates + (2 * unfused if arch.gated else 0)
    if "-" in parts:
        norms = sum(arch.norm_places)  # each norm keeps its input
        norm = {"network norm": tokens * 2 * norms * width, "network input": tokens * (2 if moe else saved) * width}
        neurons = arch.shared_ffn_size if moe else arch.ffn_size
        network = {"fc1 output": tokens * before_fc2 * neurons, "fc2 input": tokens * saved * neurons}
    if moe:
        network |= dict.fromkeys(("router", "dispatch"), tokens * 8 * (arch.num_experts or 0))
        # A rank's own tokens have as many slots as the rank receives from its group. The etp ranks gather their slots.
        slots = tokens * work.buffer_slots_per_token(arch, layout.ep) * layout.etp
        cut = (arch.expert_ffn_size or 0) / layout.etp
        sizes = (slots * saved * width, slots * (before_fc2 + unfused) * cut, slots * saved * cut)
        network |= dict(zip(ROUTED, sizes, strict=True))
    terms = attention | norm | network
    freed: set[str] = set()
    if work.recomputes("core_attn"):
        freed.add("softmax statistics")  # flash attention keeps no scores
    if moe and work.recomputes("layernorm"):  # Transformer Engine fuses the other norms with a linear layer
        freed.add("network input")
    if moe and work.recomputes("moe_act"):
        freed.add("expert fc2 input")
    if work.recomputes("moe" if moe else "mlp"):
        freed |= set(network)
    if work.recompute == "full":
        freed = set(terms) - {next(iter(terms))}  # only the input of the first norm is kept
    freed &= set(terms)
    # A layer's tensors exist together with their gradients, but never for attention and the network at once.
    working = sum(terms[term] for term in freed)
    working += max(sum(attention.values()), sum(network.values()))
    return LayerBytes({term: value for term, value in terms.items() if term not in freed}, working)


def _attention_bytes(arch: Architecture, work: Workload, saved: float, fp8: bool, tp: int) -> dict[str, float]:
    """Return the bytes that attention and its norm keep for a token on all ranks of a tensor group, by term."""
    heads, groups = arch.num_heads * arch.head_dim, max(arch.num_kv_heads, tp) * arch.head_dim
    terms = {
        "attention norm": 2 * sum(arch.norm_places) * arch.hidden_size,
        "qkv input": saved * arch.hidden_size,
        "attention": 4 * (heads + groups),
        "softmax statistics": 4 * arch.num_heads,
    }
    if tp > arch.num_kv_heads:  # every rank keeps the tensor that the group gathers, because the value is a view of it
        terms["gathered query, key and value"] = 2 * tp * (heads + 2 * arch.num_kv_heads * arch.head_dim)
    if work.recomputes("core_attn"):  # the kept value is a view of the QKV layer's output, so the whole output stays
        terms["attention"] += 2 * (heads + groups)
    if arch.qk_norm:
        terms["query and key norms"] = 2 * (heads + groups)  # the norms keep their inputs
    if arch.output_gate:
        terms["output gate"] = 4 * heads  # the gate and its factor
    if work.precision == "fp8-delayed" and fp8:
        terms["projection input"] = heads  # otherwise attention's kept output is also the projection's input
    return terms


def in_flight(layout: Layout, work: Workload, stage: int) -> list[int]:
    """Return the number of micro-batches that each chunk of a stage keeps at the peak.

    1F1B keeps pp - stage micro-batches. With interleaving, a stage keeps the 2 (pp - stage - 1) + (vp - 1) pp chunks
    of its warm-up, and one more. After every pp micro-batches, a stage goes on to its next chunk, so the first chunks
    are the fullest.
    """
    count = layout.micro_batches(work.global_batch)
    if layout.vp == 1:
        return [min(layout.pp - stage, count)]
    total = min(2 * (layout.pp - stage - 1) + (layout.vp - 1) * layout.pp + 1, count * layout.vp)
    held = [0] * layout.vp
    for turn in range(total):
        held[turn // layout.pp % layout.vp] += 1
    return held


def layers_in_flight(
    arch: Architecture, layout: Layout, work: Workload, stage: int
) -> Counter[tuple[bool, bool, str]]:
    """Count the layers whose activations a stage keeps at the peak, by kind: (has experts, is FP8, parts)."""
    counts: Counter[tuple[bool, bool, str]] = Counter()
    for chunk, count in zip(layout.chunks(arch, stage), in_flight(layout, work, stage), strict=True):
        for layer in chunk.layers:
            counts[arch.is_moe_layer(layer), work.is_fp8_layer(arch, layer), arch.parts(layer)] += count
    return counts


def _activation_bytes(arch: Architecture, layout: Layout, work: Workload, stage: int) -> tuple[float, float, float]:
    """Sum up a stage's activations at the peak (bytes): plain, of routed experts, and of the running layer."""
    counts = layers_in_flight(arch, layout, work, stage)
    held = {kind: layer_bytes(arch, layout, work, *kind) for kind in counts}
    return (
        sum(count * held[kind].plain for kind, count in counts.items()),
        sum(count * held[kind].routed for kind, count in counts.items()),
        max((layer.working for layer in held.values()), default=0.0),
    )


def least_bytes(arch: Architecture, layout: Layout, work: Workload) -> float:
    """Compute a fast lower bound of the fullest rank's memory: the states of an average rank's parameters."""
    dense, expert = average_params(arch, layout)
    weight = min(WEIGHT_BYTES, work.numbers.copy_bytes) if work.low_params else WEIGHT_BYTES
    if work.lora:  # nearly all parameters are frozen
        return (dense + expert) * weight
    owned = dense / layout.dense_shards + expert / layout.expert_dp
    states = OPTIMIZER_BYTES if work.optimizer == "adam" else MUON_BYTES
    return (dense + expert) * (weight + work.gradient_bytes) + owned * states


def least_with_activations(arch: Architecture, layout: Layout, work: Workload) -> float:
    """Compute a tighter lower bound of the fullest rank's memory, with the activations of the first stage."""
    if arch.moe_pattern or arch.mamba or arch.delta:  # the first stage may hold less than its share
        return stage_memory(arch, layout, work, 0).total
    return least_bytes(arch, layout, work) + sum(_activation_bytes(arch, layout, work, 0))


def stage_memory(arch: Architecture, layout: Layout, work: Workload, stage: int) -> Memory:
    """Sum up the memory of a pipeline stage's fullest rank; the ranks of a stage differ only in padding."""
    # Recomputation and overlap change no state, so equal states share one cache entry.
    states = stage_buffers(arch, layout, replace(work, recompute="none", overlap=()), stage)
    plain, routed, working = _activation_bytes(arch, layout, work, stage)
    tokens = work.seq_length // layout.cp * layout.micro_batch
    logits = tokens * layout.padded_vocab(arch) // layout.tp * LOGIT_BYTES
    weights, gradients, optimizer = states.weights_bytes, states.gradients_bytes, states.optimizer_bytes()
    if work.lora:  # an upper bound with tensor or pipeline parallelism: assume all adapters on every rank
        adapters, routers = lora_params(arch, work.lora)
        trained = adapters + routers
        weights += adapters * WEIGHT_BYTES
        gradients, optimizer = trained * work.gradient_bytes, trained * OPTIMIZER_BYTES
    group_sizes = (layout.tp, layout.pp, layout.cp, layout.ep, layout.etp, layout.dense_shards, layout.expert_dp)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        fp8_copies=states.fp8_bytes,
        activations=round(plain),
        routed=round(routed),
        logits=logits if stage == layout.pp - 1 else 0,
        workspace=round(working),
        context=CONTEXT_BYTES + GROUP_BYTES * sum(size > 1 for size in group_sizes),
    )


def lora_params(arch: Architecture, rank: int) -> tuple[int, int]:
    """Count the parameters of the LoRA adapters and of the routers in the whole model.

    Each linear layer of attention, of the networks and of every expert has an adapter: an inner and an outer matrix.

    Args:
        arch: the model's architecture.
        rank: rank of the adapters.
    """
    width, head = arch.hidden_size, arch.head_dim
    attention = 2 * width + (2 * arch.num_heads + 2 * arch.num_kv_heads) * head
    gate = 2 if arch.gated else 1

    def network(size: int) -> int:
        return 2 * width + (gate + 1) * size

    moe = sum(arch.is_moe_layer(layer) for layer in range(arch.num_layers)) if arch.num_experts else 0
    experts = (arch.num_experts or 0) * network(arch.expert_ffn_size or arch.ffn_size)
    experts += network(arch.shared_ffn_size) if arch.shared_ffn_size else 0
    plain = network(arch.ffn_size) * (arch.num_layers - moe)
    adapters = rank * (arch.num_layers * attention + moe * experts + plain)
    return adapters, moe * (arch.num_experts or 0) * width


def checkpoint_bytes(arch: Architecture, lora: int = 0, weight_bytes: int = WEIGHT_BYTES) -> int:
    """Return the size of a checkpoint with the optimizer states of the trained parameters.

    Args:
        arch: the model's architecture.
        lora: rank of the adapters that are trained together with the routers; 0 if all weights are trained.
        weight_bytes: bytes of a parameter.
    """
    params = trained = arch.total_params
    if lora:
        adapters, routers = lora_params(arch, lora)
        params, trained = params + adapters, adapters + routers
    return weight_bytes * params + OPTIMIZER_BYTES * trained


def worst_memory(arch: Architecture, layout: Layout, work: Workload) -> tuple[int, Memory]:
    """Return the pipeline stage whose ranks use the most memory, and the memory of these ranks."""
    # Among equal stages, the first stage keeps the most micro-batches, and only the last stage has logits.
    stages: Iterable[int] = {0, 1, layout.pp - 1}
    if layout.first or layout.last or arch.moe_pattern or arch.mamba or arch.delta:
        firsts = {_contents(arch, layout, work, stage): stage for stage in reversed(range(layout.pp))}
        stages = firsts.values()
    memories = [(stage, stage_memory(arch, layout, work, stage)) for stage in stages if stage < layout.pp]
    return max(memories, key=lambda pair: pair[1].total)


def _contents(arch: Architecture, layout: Layout, work: Workload, stage: int) -> tuple[object, ...]:
    """Describe a stage's contents; ranks of stages with equal descriptions hold the same states."""
    return tuple(
        (
            chunk.has_embedding,
            chunk.has_output,
            *((arch.is_moe_layer(n), work.is_fp8_layer(arch, n), arch.parts(n)) for n in chunk.layers),
        )
        for chunk in layout.chunks(arch, stage)
    )
