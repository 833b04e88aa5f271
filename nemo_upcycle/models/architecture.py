"""Shapes of dense and MoE models, and their parameter counts.

This is the legend of the letters in formulas and shape suffixes (`gate_FD`) of the whole package: B batch,
S sequence, T tokens, V vocabulary, D hidden size, F feed-forward (FFN) size, L layers, H attention heads,
R key-value groups, K head dim, E routed experts, G granularity, C copies of the dense network (E / G).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture_parts import Attention, DeltaLayers, Experts, MambaLayers, Multipliers, Norms
from nemo_upcycle.models.growth import check_growth, refuse_utility
from nemo_upcycle.spec import UpcycleSpec


#: Hugging Face class -> its `Family`, which says what the class can hold. The package `families` fills the table.
FAMILIES: dict[str, Any] = {}
#: Biases of the routers. Each name is a field of an `Architecture` and also a role in the mapping table. The biases
#: are buffers.
BALANCING_BIASES = ("balancing_bias", "quantile_bias")


@dataclass(frozen=True, kw_only=True)
class Architecture(Attention, Norms, Multipliers, Experts):
    """Shapes of a decoder, and the settings that the weights need.

    Args:
        hf_class: Hugging Face class, which names the tensors.
        num_layers: L.
        hidden_size: D.
        ffn_size: F of a dense layer.
        vocab_size: V.
        tied_embeddings: whether the output layer is the embedding.
        activation: activation of the feed-forward networks.
        gated: whether feed-forward networks have a gate.
        ffn_bias: whether feed-forward networks have biases.
        delta: gated delta nets; None if the model has no gated delta nets.
        mamba: Mamba layers; None if the model has no Mamba layers. A model with Mamba layers has one part per layer
            (Mamba, attention or feed-forward network) with one norm, and its attention has no rotary embedding.
    """

    hf_class: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    vocab_size: int
    tied_embeddings: bool
    activation: str = "silu"
    gated: bool = True
    ffn_bias: bool = False
    delta: DeltaLayers | None = None
    mamba: MambaLayers | None = None

    def parts(self, layer: int) -> str:
        """Return the symbols of a layer's parts.

        The symbols stand for attention (`*`), Mamba mixer (`M`), gated delta net (`G`) and feed-forward network, dense
        or with experts (`-`).
        """
        if self.mamba:
            return self.mamba.pattern[layer]
        return "G-" if self.delta and self.delta.pattern[layer] else "*-"

    @cached_property
    def _layers_with(self) -> dict[str, tuple[int, ...]]:
        return {part: tuple(n for n in range(self.num_layers) if part in self.parts(n)) for part in "*-MG"}

    def layers_with(self, part: str) -> tuple[int, ...]:
        """Return the layers that have a part, given by its symbol."""
        return self._layers_with[part]

    @cached_property
    def _global(self) -> Architecture:
        return replace(self, **vars(self.global_heads), global_heads=None) if self.global_heads else self

    def at(self, layer: int) -> Architecture:
        """Return the architecture with the attention heads of one layer."""
        return self._global if self.global_heads and self.window_of(layer) is None else self

    def require_trained(self) -> None:
        """Check that the model can be trained.

        Raises:
            CheckpointError: no trainer of this package can build the model's layers.
        """
        if self.keeps_network:
            raise CheckpointError(
                f"layers of {self.hf_class or 'the model'}",
                kind="refused",
                got=(
                    "cannot be trained: they have heads of two sizes and a dense network beside the experts (Gemma "
                    "4), which neither Megatron-Core nor this package builds"
                ),
                fix="convert the model (nemo-upcycle convert), and train the folder with another trainer",
            )

    @cached_property
    def moe_layer_count(self) -> int:
        """Number of layers with experts."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert; 0 in a dense model."""
        return self.ffn_params(self.expert_ffn_size or 0) if self.num_experts else 0

    def ffn_params(self, ffn_size: int) -> int:
        """Count the parameters of one feed-forward network of F neurons: gate (if gated), up, down, biases."""
        matrices = 3 if self.gated else 2
        biases = (matrices - 1) * ffn_size + self.hidden_size if self.ffn_bias else 0
        return matrices * ffn_size * self.hidden_size + biases

    @property
    def attention_params(self) -> int:
        """Parameters of one layer's attention, with its biases and inner norms."""
        heads, groups = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        matrices = (3 if self.output_gate else 2) * heads + (1 if self.value_is_key else 2) * groups
        count = matrices * self.hidden_size
        count += (heads + 2 * groups if self.qkv_bias else 0) + (self.hidden_size if self.attention_out_bias else 0)
        count += self.num_heads if self.softmax_type == "learnable" else 0
        if self.qk_norm:
            count += heads + groups if self.wide_qk_norm else 2 * self.head_dim
        return count

    @property
    def embedding_params(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab_size * self.hidden_size

    def _moe_params(self, experts: int) -> int:
        """Count the parameters of an MoE layer's router, shared experts and `experts` routed experts."""
        router = (self.num_experts or 0) * (self.hidden_size + (1 if self.ffn_bias else 0))
        shared = self.ffn_params(self.shared_ffn_size) if self.shared_ffn_size else 0
        shared += self.hidden_size * (self.shared_gate + self.keeps_network)
        return experts * self.expert_params + router + shared

    def _params(self, experts: int) -> int:
        """Count all parameters, with `experts` routed experts per MoE layer. Tied embeddings count once."""
        embeddings = self.embedding_params * (1 if self.tied_embeddings else 2)
        attentions, networks, mamba, delta = (len(self.layers_with(part)) for part in "*-MG")
        with_global = sum(self.at(layer) is not self for layer in range(self.num_layers)) if self.global_heads else 0
        dense, moe_layers = self.ffn_params(self.ffn_size), self.moe_layer_count
        layers = (attentions - with_global) * self.attention_params + with_global * self._global.attention_params
        layers += (networks - moe_layers) * dense + (self.num_layers if self.keeps_network else 0)
        layers += moe_layers * self._moe_params(experts)
        layers += mamba * self.mamba.params(self.hidden_size) if self.mamba else 0
        layers += delta * self.delta.params(self.hidden_size) if self.delta else 0
        norms = (sum(self.norm_places) * (attentions + networks + mamba + delta) + 1) * self.hidden_size
        return layers + embeddings + norms

    @property
    def total_params(self) -> int:
        """All parameters. Tied embeddings count once.

        Example:
            Llama 3 8B has 8_030_261_248 parameters, and 47_491_321_856 after upcycling to eight experts. arXiv
            2412.09952 prints 34.4B, because it omits one of the three matrices of each extra expert.
        """
        return self._params(self.num_experts or 0)

    @property
    def active_params(self) -> int:
        """Parameters that one token passes through.

        Example:
            Llama 3 8B E8T2 has 13_668_454_400 active parameters. The paper prints 11.8B.
        """
        return self._params(self.top_k or 0)

    @property
    def dense(self) -> Architecture:
        """The same model without experts. The sizes are the parent's sizes if the model is upcycled."""
        kept = replace(self, num_experts=None, top_k=None, expert_ffn_size=None, moe_pattern=None)
        return replace(kept, shared_ffn_size=0, shared_gate=False)

    def upcycled(self, spec: UpcycleSpec) -> Architecture:
        """Return the MoE architecture that a spec makes from this architecture.

        The result's Hugging Face class is the first class that can hold the model, of the classes that lack the fewest
        settings; "" if no class can hold the model. A parent with experts keeps its class.

        Raises:
            SpecError: the spec's layers or experts do not fit this architecture.
            CheckpointError: granularity does not divide F.
        """
        if self.num_experts:
            check_growth(self, spec)
            return replace(self, num_experts=spec.num_experts, top_k=spec.top_k)
        refuse_utility(spec)
        if self.ffn_size % spec.granularity:
            divisors = [number for number in range(1, 65) if self.ffn_size % number == 0]
            raise CheckpointError(
                field="granularity",
                got=spec.granularity,
                expected=f"a divisor of {self.ffn_size}, the feed-forward size",
                fix="use one of " + ", ".join(str(number) for number in divisors),
            )
        width = self.ffn_size // spec.granularity
        networks = self.layers_with("-")
        has_experts = dict(zip(networks, spec.moe_pattern(len(networks)), strict=True))
        pattern = tuple(has_experts.get(layer, False) for layer in range(self.num_layers))
        moe_arch = replace(
            self,
            hf_class="",
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            expert_ffn_size=width,
            shared_ffn_size=spec.shared_experts * width + (self.ffn_size if self.keeps_network else 0),
            moe_pattern=None if all(pattern) else pattern,
            norm_topk=spec.sums_to_one,
            router_score=spec.router_score,
            routed_scaling_factor=spec.routed_scaling_factor,
        )
        holds = [family for family in FAMILIES.values() if not any(family.unsupported(moe_arch))]
        best = min(holds, key=lambda family: len(family.folded(moe_arch)), default=None)
        return replace(moe_arch, hf_class=best.hf_class if best else "")
