"""The estimated time of a step: work and traffic of every part of a layer, divided by the machine's speed.

The result is a sum of times, each with a physical meaning. Work and traffic are counted. `Machine` has the fractions
of the peaks that kernels reach. These fractions are fitted to published measurements (`benchmarks/throughput.py`;
table and errors in benchmarks/results/planner.md). All times are for one GPU, forward and backward together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.architecture_parts import DeltaLayers, MambaLayers
from nemo_upcycle.models.flops import mean_context
from nemo_upcycle.planning.hardware import Gpu, Machine
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.parameters import average_params
from nemo_upcycle.planning.workload import LayerKind, Workload, layer_kinds


#: Rows and columns of the tiles that matrix products work on.
_TILE = 128
#: Tokens of a chunk of Mamba-2's scan, as in Megatron-Core (`mamba_chunk_size`).
_CHUNK = 128


@dataclass
class StepTime:
    """The time of a step, or of a part of a step, by cause (seconds); time hidden by computation does not count.

    Args:
        gemm: matrix products.
        attention: core attention.
        memory: norms, activation functions, permutations, casts, the optimizer.
        launch: kernel launches and host work.
        nvlink: traffic inside a node.
        network: traffic between nodes.
        bubble: waiting for other pipeline stages.
    """

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    nvlink: float = 0.0
    network: float = 0.0
    bubble: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts (seconds)."""
        return float(sum(self.__dict__.values()))

    @property
    def bound_by(self) -> str:
        """The cause that takes the most time: `compute`, `hbm`, `launch`, `nvlink`, `infiniband` or `bubble`."""
        parts = {
            "compute": self.gemm + self.attention,
            "hbm": self.memory,
            "launch": self.launch,
            "nvlink": self.nvlink,
            "infiniband": self.network,
            "bubble": self.bubble,
        }
        return max(parts, key=lambda name: parts[name])

    def add(self, other: StepTime, times: float = 1.0) -> None:
        """Add another time, multiplied by a factor."""
        sums = self.__dict__
        for name, value in other.__dict__.items():
            sums[name] += times * value

    def to_dict(self) -> dict[str, float]:
        """Return all parts and their sum (seconds)."""
        return self.__dict__ | {"total": self.total}


class ThroughputModel:
    """Predicts the step times of one architecture on one kind of GPU.

    Args:
        arch: the trained model's architecture.
        gpu: kind of the GPUs.
        machine: fractions of the GPU's peaks that are reached.
    """

    def __init__(self, arch: Architecture, gpu: Gpu, machine: Machine) -> None:
        self.arch, self.gpu, self.machine = arch, gpu, machine
        self._known: dict[tuple[object, ...], tuple[StepTime, StepTime]] = {}

    def step(self, layout: Layout, work: Workload) -> StepTime:
        """Return the time of a step.

        With m micro-batches, the time is a sum: m times the slowest stage, the bubble, the data-parallel traffic that
        nothing hides, and the optimizer. The bubble is (pp - 1) / (m vp) of the first time (arXiv 2104.04473).
        """
        count = layout.micro_batches(work.global_batch)
        layer, output = self._parts(layout, work)
        # The slowest stage sets the pace: the last stage, which has the output layer, or a stage with more layers.
        counts = layout.stage_layers(self.arch.num_layers)
        stage = StepTime()
        stage.add(layer, counts[-1])
        stage.add(output)
        if max(counts) > counts[-1]:
            fullest = StepTime()
            fullest.add(layer, max(counts))
            stage = max(stage, fullest, key=lambda times: times.total)
        stage.add(self._send(layout, work))
        if "launch" in work.overlap:
            stage.launch = 0.0
        step = StepTime(bubble=stage.total * (layout.pp - 1) / layout.vp)
        step.add(stage, count)
        step.memory += self._optimizer_s(layout, work)
        step.network += self._data_parallel_s(layout, work, stage.total * 2 / 3)
        return step

    def _parts(self, layout: Layout, work: Workload) -> tuple[StepTime, StepTime]:
        """Return the times of an average layer and of the output layer, for one micro-batch."""
        sizes = (layout.tp, layout.cp, layout.ep, layout.etp, layout.micro_batch)
        key = (*sizes, layout.node_gpus(self.gpu.nvlink_gpus), work)
        if key not in self._known:
            layer, in_bf16 = StepTime(), replace(work, precision="bf16")
            for kind, count in layer_kinds(self.arch, work).items():
                layer.add(self._layer(layout, work if kind.fp8 else in_bf16, kind), count / self.arch.num_layers)
            self._known[key] = layer, self._output(layout, in_bf16)
        return self._known[key]

    def _layer(self, layout: Layout, work: Workload, kind: LayerKind) -> StepTime:
        moe, width = kind.moe, self.arch.hidden_size
        tokens = work.seq_length / layout.cp * layout.micro_batch
        layer = StepTime(launch=self.machine.layer_us * 1e-6 * len(kind.parts) / 2)
        # Norms and residuals.
        self._moved(layer, tokens / layout.tp * 12 * width * len(kind.parts), work)
        if "*" in kind.parts:
            self._attention(layer, tokens, layout, work, kind.window)
        if "M" in kind.parts and self.arch.mamba:
            self._mamba(layer, self.arch.mamba, tokens, layout, work)
        if "G" in kind.parts and self.arch.delta:
            self._delta(layer, self.arch.delta, tokens, layout, work)
        network = self._moe(layout, work, tokens) if moe else StepTime()
        if moe:
            hidden = layer.total + network.total if "ep" in work.overlap else 0.0
            self._dispatch(network, layout, work, tokens, hidden)
        elif "-" in kind.parts:
            self._network(network, tokens, self.arch.ffn_size / layout.tp, work)
            self._tensor_traffic(network, tokens, layout, work)
        if work.recomputes("core_attn") and "*" in kind.parts:
            layer.attention *= 1 + 1 / 3.5
        layer.add(layer, 1 / 3 if work.recompute == "full" else 0.0)
        network_again = work.recompute == "full" or work.recomputes("moe" if moe else "mlp")
        layer.add(network, 1 + (1 / 3 if network_again else 0.0))
        if moe and work.recomputes("moe_act"):
            # The busiest rank reads the gate and up outputs again, and writes their product again.
            slots = tokens / layout.tp * self._slots_per_token(layout, work)
            self._moved(layer, slots * 3 * (self.arch.expert_ffn_size or 0), work)
        if moe and work.recomputes("layernorm"):
            self._moved(layer, tokens / layout.tp * 2 * width, work)
        return layer

    def _attention(self, layer: StepTime, tokens: float, layout: Layout, work: Workload, window: int | None) -> None:
        """Add attention: its projections, core attention, and the traffic of parallelism."""
        arch = self.arch
        queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        # Core attention is called once for each step of context parallelism's ring.
        layer.launch += self.machine.layer_us * 1e-6 * (layout.cp - 1) / 4
        gates = queries if arch.output_gate else 0
        for inputs, outputs in ((arch.hidden_size, queries + gates + 2 * keys), (queries, arch.hidden_size)):
            self._matrix(layer, tokens, inputs, outputs / layout.tp, 1, work)
        # The forward pass has two products over the causal half. The backward pass takes 2.5 times as much.
        scores = 2.0 * tokens * mean_context(work.seq_length, window) * 2 * queries / layout.tp
        layer.attention += 3.5 * scores / (self.machine.attention * self.gpu.bf16_tflops * 1e12)
        # Rotary embedding, and inputs and output of core attention.
        self._moved(layer, tokens / layout.tp * 8 * (queries + keys), work)
        self._tensor_traffic(layer, tokens, layout, work)
        if layout.tp > arch.num_kv_heads:  # ranks that share a key-value head gather and scatter query, key and value
            gathered = 2 * 2 * tokens * (queries + gates + 2 * keys) * (layout.tp - 1) / layout.tp
            self._link(layer, layout, gathered, layout.tp, layout.tp)
        # Keys and values travel round the ring once in the forward pass, and with their gradients in the backward
        # pass. Attention hides this traffic.
        ring = 3 * 2 * 2 * keys / layout.tp * tokens * (layout.cp - 1)
        self._link(layer, layout, ring, layout.tp * layout.cp, layout.cp, hidden=layer.attention)

    def _mamba(self, layer: StepTime, mamba: MambaLayers, tokens: float, layout: Layout, work: Workload) -> None:
        """Add a Mamba-2 mixer: two projections, and the scan over chunks (arXiv 2405.21060, section 6)."""
        inner, states = mamba.rows("x"), mamba.rows("B")
        rows = 2 * (inner + states) + mamba.rows("dt")
        # A chunk needs the causal half of C B and of its product with x. Two products write and read the states.
        chunk = _CHUNK / 2 * (states + inner) + 2 * inner * mamba.state_size
        kept = 2 * 2 * inner * mamba.state_size / _CHUNK
        self._scan(layer, (rows, inner), chunk, kept, tokens, layout, work)

    def _delta(self, layer: StepTime, delta: DeltaLayers, tokens: float, layout: Layout, work: Workload) -> None:
        """Add a gated delta net: two projections, and the rule over chunks (arXiv 2412.06464, section 3.3)."""
        inner, heads, width = delta.rows("value"), delta.num_value_heads, delta.key_dim
        rows = 2 * delta.rows("key") + 2 * inner + 2 * heads
        # Products within a chunk (causal half): key times key, two products with its inverse, query times key, and the
        # result times the value. The states are written once and read twice.
        state = heads * width * delta.value_dim
        chunk = delta.chunk_size / 2 * heads * (3 * width + 2 * delta.value_dim) + 3 * state
        self._scan(layer, (rows, inner), chunk, 2 * 2 * state / delta.chunk_size, tokens, layout, work)

    def _scan(
        self,
        layer: StepTime,
        sizes: tuple[int, int],
        products: float,
        kept: float,
        tokens: float,
        layout: Layout,
        work: Workload,
    ) -> None:
        """Add a mixer that works chunk by chunk.

        Args:
            layer: sum to add to.
            sizes: output rows of the input projection, and input columns of the output projection.
            products: multiply-adds of a token within the mixer.
            kept: traffic of the kept states, for each token.
            tokens: tokens of the micro-batch on a rank, before tensor parallelism cuts them.
            layout: the parallel sizes.
            work: work of a step.
        """
        rows, inner = sizes
        self._matrix(layer, tokens, self.arch.hidden_size, rows / layout.tp, 1, work)
        self._matrix(layer, tokens, inner / layout.tp, self.arch.hidden_size, 1, work)
        layer.attention += (
            3.5 * 2 * tokens * products / layout.tp / (self.machine.attention * self.gpu.bf16_tflops * 1e12)
        )
        # Convolution, scan, gate and norm read and write the rows and their gradients. The states are float32, one per
        # chunk.
        self._moved(layer, tokens / layout.tp * 3 * (2 * rows + 4 * inner + kept), work)
        self._tensor_traffic(layer, tokens, layout, work)
        # With context parallelism each rank gathers the whole sequence for some heads, and scatters it back.
        volume = 2 * 2 * tokens * (rows + inner) / layout.tp * (layout.cp - 1) / layout.cp
        self._link(layer, layout, volume, layout.tp * layout.cp, layout.cp)

    def _moe(self, layout: Layout, work: Workload, tokens: float) -> StepTime:
        arch, machine, local = self.arch, self.machine, (self.arch.num_experts or 1) // layout.ep
        slots = tokens / layout.tp * self._slots_per_token(layout, work)
        expert_us = machine.expert_us if work.pad else machine.uneven_us(work.numbers)
        times = StepTime(launch=(machine.moe_us + expert_us * (local - 1)) * 1e-6)
        neurons = (arch.expert_ffn_size or 0) / layout.etp
        # A rank's experts get slots from the whole group: etp times as many as the rank's own tokens have.
        self._network(times, slots * layout.etp / local, neurons, work, local)
        # Permute, sort by expert, sort back, unpermute: each reads and writes, forward and backward.
        self._moved(times, slots * 16 * arch.hidden_size, work)
        if arch.shared_ffn_size:
            self._network(times, tokens, arch.shared_ffn_size / layout.tp, work)
            self._tensor_traffic(times, tokens, layout, work)
        return times

    def _slots_per_token(self, layout: Layout, work: Workload) -> float:
        """Return the token slots per token on the busiest expert rank, because the other ranks wait for it."""
        busiest = self.machine.waits_for(self.arch.num_experts or 0, natural=work.routing == "natural")
        room = work.capacity_factor if work.capacity_factor is not None else busiest
        waits = 1.0 if work.pad or layout.ep == 1 else max(1.0, min(busiest, room))
        return work.slots_per_token(self.arch) * waits

    def _dispatch(self, times: StepTime, layout: Layout, work: Workload, tokens: float, hidden: float) -> None:
        """Add the exposed traffic of tokens to their experts and back, forward and backward."""
        copies = self._slots_per_token(layout, work)
        span = layout.etp * layout.ep
        if work.dispatcher != "alltoall":
            # A token is sent only once to each rank (inside a node) or to each node that has some of its experts.
            per_node = layout.node_gpus(self.gpu.nvlink_gpus)
            places = layout.ep if span <= per_node else span // per_node
            copies *= self._expected_places(places) / (self.arch.top_k or 1)
        bytes_of_copy = 4 * 2 * tokens / layout.tp * self.arch.hidden_size
        volume = bytes_of_copy * copies * (layout.ep - 1) / layout.ep
        self._link(times, layout, volume, span, layout.ep, hidden, self.machine.ep_hidden)
        slots = tokens / layout.tp * self._slots_per_token(layout, work)
        self._link(times, layout, 4 * 2 * slots * self.arch.hidden_size * (layout.etp - 1), layout.etp, layout.etp)

    def _expected_places(self, places: int) -> float:
        """Return the expected number of distinct ranks or nodes with experts of a token, under uniform routing."""
        experts, top_k = self.arch.num_experts or 1, self.arch.top_k or 1
        return places * (1 - math.comb(experts - experts // places, top_k) / math.comb(experts, top_k))

    def _network(self, times: StepTime, rows: float, neurons: float, work: Workload, count: int = 1) -> None:
        gates, width = 2 if self.arch.gated else 1, self.arch.hidden_size
        self._matrix(times, rows, width, gates * neurons, count, work)
        self._matrix(times, rows, neurons, width, count, work)
        self._moved(times, count * rows * 8 * neurons, work)

    def _matrix(self, times: StepTime, rows: float, inner: float, columns: float, count: int, work: Workload) -> None:
        """Add `count` products [rows, inner] x [inner, columns], each with its two gradients."""
        machine, numbers = self.machine, work.numbers
        bandwidth = machine.memory * self.gpu.hbm_gb_s * 1e9
        reached = {16: machine.gemm, 8: machine.gemm_fp8, 4: machine.gemm_fp4}[numbers.bits]
        if inner % _TILE or columns % _TILE:
            reached *= machine.ragged
        compute_s = 6.0 * count * rows * inner * columns / (reached * self.gpu.peak_tflops(numbers) * 1e12)
        size = numbers.bits / 8
        # Each operand is read twice and each result is written once. A weight's gradient is read and written.
        moved = size * 2 * (rows * inner + rows * columns + inner * columns) + 2 * (rows * inner + rows * columns)
        moved += 2 * work.gradient_bytes * inner * columns
        memory_s = count * moved / bandwidth
        # Roofline: the longer of the two times hides the shorter.
        times.gemm += compute_s
        times.memory += max(0.0, memory_s - compute_s)
        # Input and output gradient are cast here. The weight is cast only once per step, so its cast is omitted.
        times.memory += count * numbers.cast_bytes * rows * (inner + columns) / bandwidth

    def _moved(self, times: StepTime, elements: float, work: Workload) -> None:
        """Add the traffic of 16-bit elements outside matrix products, plus 25 % if FP8 casts are not counted."""
        casts = 1.25 if work.numbers.fp8 and not work.numbers.cast_bytes else 1.0
        times.memory += 2.0 * elements * casts / (self.machine.memory * self.gpu.hbm_gb_s * 1e9)

    def _tensor_traffic(self, times: StepTime, tokens: float, layout: Layout, work: Workload) -> None:
        """Add sequence parallelism's gathers and scatters of the tokens: two forward, three backward."""
        volume = 5 * 2 * tokens * self.arch.hidden_size * (layout.tp - 1) / layout.tp
        if "tp" in work.overlap:
            volume *= 1 - self.machine.tp_hidden
        self._link(times, layout, volume, layout.tp, layout.tp)

    def _link(
        self,
        times: StepTime,
        layout: Layout,
        volume: float,
        span: int,
        size: int,
        hidden: float = 0.0,
        share: float = 1.0,
    ) -> None:
        """Add the traffic of a group that lies within `span` neighbouring ranks.

        Args:
            times: sum to add to.
            layout: the parallel sizes.
            volume: traffic of a rank (bytes).
            span: neighbouring ranks that contain the group.
            size: ranks of the group.
            hidden: work that can hide the traffic (seconds).
            share: fraction of the traffic that can be hidden.
        """
        if volume <= 0 or size <= 1:
            return
        per_node = layout.node_gpus(self.gpu.nvlink_gpus)
        inside = span <= per_node
        bandwidth = self.gpu.nvlink_gb_s if inside else self.gpu.network_gb_s
        # If a group spans several nodes, a rank reaches the members in its own node over NVLink.
        away = 1.0 if inside else 1 - (per_node * size / span - 1) / max(size - 1, 1)
        time_s = volume * max(away, 0.0) / (self.machine.link * bandwidth * 1e9)
        time_s -= min(hidden, share * time_s)
        if inside:
            times.nvlink += time_s
        else:
            times.network += time_s

    def _output(self, layout: Layout, work: Workload) -> StepTime:
        """Return the time of the output layer and the loss, which only the last stage computes."""
        times = StepTime()
        tokens = work.seq_length / layout.cp * layout.micro_batch
        vocabulary = layout.padded_vocab(self.arch) / layout.tp
        self._matrix(times, tokens, self.arch.hidden_size, vocabulary, 1, work)
        self._moved(times, tokens * vocabulary * 12, work)
        return times

    def _send(self, layout: Layout, work: Workload) -> StepTime:
        """Return the time of sending activations between stages: hidden with interleaving, exposed without."""
        times = StepTime()
        if layout.pp > 1 and layout.vp == 1:
            tokens = work.seq_length / layout.cp * layout.micro_batch
            self._link(times, layout, 4 * tokens * self.arch.hidden_size / layout.tp, layout.gpus, layout.gpus)
        return times

    def _optimizer_s(self, layout: Layout, work: Workload) -> float:
        dense, expert = average_params(self.arch, layout)
        owned = dense / layout.dense_shards + expert / layout.expert_dp
        # Adam reads and writes gradient, master and moments, and writes the weight. Clearing writes the gradients.
        moved = owned * (30 + work.gradient_bytes) + (dense + expert) * 2 * work.gradient_bytes
        return moved / (self.machine.memory * self.gpu.hbm_gb_s * 1e9)

    def _data_parallel_s(self, layout: Layout, work: Workload, backward_s: float) -> float:
        """Return the exposed time of reducing gradients and gathering weights, which is at least one layer's share.

        A ring over several nodes uses the network cards of all its members in a node at once.
        """
        dense, expert = average_params(self.arch, layout)
        sent = work.gradient_bytes + (work.numbers.gather_bytes if work.low_params else 2)
        time_s = 0.0
        for params, ranks, stride in (
            (dense, layout.dense_shards, layout.tp),
            (expert, layout.expert_dp, layout.ep * layout.etp),
        ):
            members = max(1, layout.node_gpus(self.gpu.nvlink_gpus) // stride)
            bandwidth = self.gpu.nvlink_gb_s
            if ranks > members:
                bandwidth = min(bandwidth, self.gpu.network_gb_s * members)
            time_s += sent * params * (1 - 1 / ranks) / (self.machine.link * bandwidth * 1e9)
        return max(time_s / max(1, self.arch.num_layers // layout.pp), time_s - backward_s)
