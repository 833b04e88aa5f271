"""Shapes of dense and MoE models, and their parameter counts.

THE legend of letters, of formulas and of shape suffixes (`gate_FD`) in the whole package: B batch, S sequence,
T tokens, V vocabulary, D hidden size, F feed-forward (FFN) size, L layers, H attention heads, R key-value groups,
K head dim, E routed experts, G granularity, C copies of the dense network (E / G).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.growth import check_growth, refuse_utility
from nemo_upcycle.spec import RouterKind, UpcycleSpec, find_router_kind


#: Hugging Face class -> its `Family`, which says what it can hold: `families` hands in each.
FAMILIES: dict[str, Any] = {}
#: Fields of an `Architecture` that say which biases its routers have, and roles in the mapping table: buffers.
BALANCING_BIASES = ("balancing_bias", "quantile_bias")


@dataclass(frozen=True, kw_only=True)
class MambaLayers:
    """The Mamba-2 layers of a model in which attention and networks are layers of their own, too, as in Nemotron-H.

    Args:
        pattern: what each layer of the dense model is: `M` (Mamba-2), `*` (attention) or `-` (network).
        num_heads: heads of a Mamba layer.
        head_dim: numbers of such a head.
        num_groups: groups of heads that share B and C.
        state_size: numbers of a head's state.
    """

    #: Tokens that the convolution before the scan sees; Megatron-Core can have no others.
    conv_size: ClassVar[int] = 4

    pattern: str
    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int

    def rows(self, part: str) -> int:
        """Return the rows of a part of a Mamba layer's tensors: `z`, `x`, `B`, `C`, or `dt` and all else of a head."""
        states = self.num_groups * self.state_size
        sizes = dict.fromkeys("zx", self.num_heads * self.head_dim) | dict.fromkeys("BC", states)
        return sizes.get(part, self.num_heads)

    def params(self, hidden_size: int) -> int:
        """Return the parameters of one Mamba layer, but its norm of D: projections, convolution, norm, A, D, dt."""
        z, x, b, c, dt = (self.rows(part) for part in ("z", "x", "B", "C", "dt"))
        return (z + 2 * x + b + c + dt) * hidden_size + (x + b + c) * (self.conv_size + 1) + x + 3 * dt


@dataclass(frozen=True, kw_only=True)
class DeltaLayers:
    """The gated delta nets (arXiv 2412.06464) that stand in the place of attention in some layers, as in Qwen3.5.

    Args:
        pattern: which layers have one.
        num_key_heads: heads of query and key.
        num_value_heads: heads of the value, and of all that is one number a head.
        key_dim: numbers of a head of query or key.
        value_dim: numbers of a head of the value.
        conv_size: tokens that the convolution of query, key and value sees.
    """

    #: Tokens that its rule takes at once.
    chunk_size: ClassVar[int] = 64

    pattern: tuple[bool, ...]
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_size: int = 4

    def rows(self, part: str) -> int:
        """Return the rows of a part of the tensors: `query`, `key`, `value`, its gate `z`, or all else of a head."""
        sizes = dict.fromkeys(("query", "key"), self.num_key_heads * self.key_dim)
        sizes |= dict.fromkeys(("value", "z"), self.num_value_heads * self.value_dim)
        return sizes.get(part, self.num_value_heads)

    def params(self, hidden_size: int) -> int:
        """Return the parameters of one net, but its norm of D: projections, convolution, norm, A, dt."""
        key, value, heads = (self.rows(part) for part in ("key", "value", "heads"))
        convolution = (2 * key + value) * self.conv_size
        return (2 * key + 3 * value + 2 * heads) * hidden_size + convolution + self.value_dim + 2 * heads


@dataclass(frozen=True, kw_only=True)
class GlobalHeads:
    """Heads of layers without a window, where they are others than those of layers with one, as in Gemma 4.

    Args:
        head_dim: K of these layers.
        num_kv_heads: their R.
        value_is_key: whether the projection of keys gives the values, too.
    """

    head_dim: int
    num_kv_heads: int
    value_is_key: bool


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything about a decoder that decides shapes, and what has to travel with its weights.

    Args:
        hf_class: the Hugging Face class that names its tensors.
        ffn_size: F of a dense layer.
        expert_ffn_size: F of one routed expert; None in a dense model.
        shared_ffn_size: F of all shared experts together; 0 without.
        shared_gate: whether a token decides by what, from 0 to 1, their output is multiplied.
        moe_pattern: which layers are MoE layers; None: all, if there are experts.
        norm_topk: whether the weights of the chosen experts are made to sum to one.
        router_score: what the router's logits go through, as in `UpcycleSpec`.
        routed_scaling_factor: on the weights of the chosen experts.
        balancing_bias: whether every routed expert has a bias that counts when experts are chosen, and that a training
            moves to balance them (arXiv 2408.15664). It is no parameter.
        quantile_bias: whether it has one that is taken from its logits instead, a quantile of them.
        qk_norm: whether query and key are normalised before the rotary embedding, head by head.
        wide_qk_norm: whether over all heads at once instead.
        pre_norm: whether a layer has norms before attention and feed-forward network.
        post_norm: whether it has norms after them.
        zero_centered_norm: whether norms store their distance from one.
        scaled_embedding: whether the embedding is multiplied by the root of D.
        embedding_multiplier: factor on the embedding, as Granite has it.
        attention_multiplier: factor on the products of query and key; None: one over the root of K.
        residual_multiplier: factor on what attention and network add to their input.
        logits_scaling: what the logits are divided by.
        local_rope_theta: base of the rotary embedding of layers with a window, unscaled; None: they have all layers'.
        rope_pattern: in which layers the rotary embedding turns heads; None: in all.
        rotary_percent: part of a head, its first numbers, that the rotary embedding turns; 1: all of it.
        sliding_window: tokens that attention sees, the current one included; None: all before it.
        window_pattern: in which layers it does; None: in all.
        output_gate: whether attention has a gate, made of its input as the query is, that its output is multiplied by.
        delta: the gated delta nets of a model that has any.
        global_heads: heads of layers without a window; None: the same in all.
        value_is_key: whether the projection of keys gives the values, too.
        keeps_network: whether its layers are Gemma 4's: one with experts keeps the dense network beside them, each
            with norms of its own, and every layer's output has a factor.
        mamba: the Mamba layers of a model that has any: each layer is then one of them, an attention or a network,
            with one norm, and attention has no rotary embedding.
    """

    hf_class: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    zero_centered_norm: bool = False
    scaled_embedding: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)  # a dict has no hash
    local_rope_theta: float | None = None
    rope_pattern: tuple[bool, ...] | None = None
    rotary_percent: float = 1.0
    max_positions: int = 4096
    sliding_window: int | None = None
    window_pattern: tuple[bool, ...] | None = None
    num_experts: int | None = None
    top_k: int | None = None
    expert_ffn_size: int | None = None
    shared_ffn_size: int = 0
    shared_gate: bool = False
    moe_pattern: tuple[bool, ...] | None = None
    norm_topk: bool = True
    router_score: str = "softmax"
    routed_scaling_factor: float = 1.0
    balancing_bias: bool = False
    quantile_bias: bool = False
    output_gate: bool = False
    delta: DeltaLayers | None = None
    global_heads: GlobalHeads | None = None
    value_is_key: bool = False
    keeps_network: bool = False
    mamba: MambaLayers | None = None

    @property
    def norm_places(self) -> tuple[bool, bool]:
        """Whether norms stand before attention and network, and after them."""
        return self.pre_norm, self.post_norm

    @property
    def softmax_scale(self) -> float:
        """The factor on the products of query and key."""
        return 1 / math.sqrt(self.head_dim) if self.attention_multiplier is None else self.attention_multiplier

    @property
    def scales_in_layers(self) -> bool:
        """Whether layers have these rotary frequencies in Megatron, whose models know none of the kind."""
        return self.local_rope_theta is not None or (self.rope_scaling or {}).get("rope_type") in ("yarn", "linear")

    @property
    def window(self) -> int | None:
        """The sliding window, in tokens; None where no sequence is longer."""
        return self.sliding_window if self.sliding_window and self.sliding_window < self.max_positions else None

    @property
    def router_kind(self) -> RouterKind:
        """The kind of its routers."""
        return find_router_kind(self.router_score, pre_softmax=not self.norm_topk)

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return bool(self.num_experts) and (self.moe_pattern is None or self.moe_pattern[layer])

    def parts(self, layer: int) -> str:
        """Name the parts of a layer: attention (`*`), a network, dense or of experts (`-`), or what mixes tokens else.

        That is a Mamba mixer (`M`), or a gated delta net (`G`).
        """
        if self.mamba:
            return self.mamba.pattern[layer]
        return "G-" if self.delta and self.delta.pattern[layer] else "*-"

    @cached_property
    def _layers_with(self) -> dict[str, tuple[int, ...]]:
        return {part: tuple(n for n in range(self.num_layers) if part in self.parts(n)) for part in "*-MG"}

    def layers_with(self, part: str) -> tuple[int, ...]:
        """Return the layers that have a part."""
        return self._layers_with[part]

    def window_of(self, layer: int) -> int | None:
        """Return the tokens that a layer's attention sees; None for all."""
        return self.sliding_window if self.window_pattern is None or self.window_pattern[layer] else None

    @cached_property
    def _global(self) -> Architecture:
        return replace(self, **vars(self.global_heads), global_heads=None) if self.global_heads else self

    def at(self, layer: int) -> Architecture:
        """Return the architecture with the heads that a layer has."""
        return self._global if self.global_heads and self.window_of(layer) is None else self

    def require_trained(self) -> None:
        """Check that layers in a training can be the model's.

        Raises:
            CheckpointError: none can.
        """
        if self.keeps_network:
            raise CheckpointError(
                f"layers of {self.hf_class or 'the model'}",
                got="heads of two sizes, and a network kept beside the experts with a norm behind each (Gemma 4)",
                expected="layers of Megatron-Core or of this package; Megatron-Bridge's own of Gemma 4 are not filled",
                fix="convert it (nemo-upcycle convert), and train the folder where its class is known",
            )

    @cached_property
    def moe_layer_count(self) -> int:
        """Layers with experts."""
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
        if self.qk_norm:
            count += heads + groups if self.wide_qk_norm else 2 * self.head_dim
        return count

    @property
    def embedding_params(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab_size * self.hidden_size

    def _moe_params(self, experts: int) -> int:
        """Return the parameters of an MoE layer's network, with `experts` routed experts."""
        router = (self.num_experts or 0) * (self.hidden_size + (1 if self.ffn_bias else 0))
        shared = self.ffn_params(self.shared_ffn_size) if self.shared_ffn_size else 0
        shared += self.hidden_size * (self.shared_gate + self.keeps_network)
        return experts * self.expert_params + router + shared

    def _params(self, experts: int) -> int:
        """Return all parameters, with `experts` routed experts counted per MoE layer; tied embeddings count once."""
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
        """All parameters; tied embeddings count once.

        Example:
            Llama 3 8B has 8_030_261_248, its eight-expert upcycling 47_491_321_856 (arXiv 2412.09952 prints 34.4B: the
            extra experts without one of their three matrices).
        """
        return self._params(self.num_experts or 0)

    @property
    def active_params(self) -> int:
        """Parameters that one token passes through; Llama 3 8B E8T2 has 13_668_454_400 (the paper prints 11.8B)."""
        return self._params(self.top_k or 0)

    @property
    def dense(self) -> Architecture:
        """The same model without experts: of one that was upcycled, the sizes of its parent."""
        kept = replace(self, num_experts=None, top_k=None, expert_ffn_size=None, moe_pattern=None)
        return replace(kept, shared_ffn_size=0, shared_gate=False)

    def upcycled(self, spec: UpcycleSpec) -> Architecture:
        """Return the MoE architecture that a spec makes of this one.

        The Hugging Face class is the first that can hold the model; "" if none can. That of a parent with experts
        stays.

        Raises:
            SpecError: the spec's layers do not fit, or what it says of experts.
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
                expected=f"a divisor of the feed-forward size {self.ffn_size}",
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
        classes = (name for name, family in FAMILIES.items() if not any(family.unsupported(moe_arch)))
        return replace(moe_arch, hf_class=next(classes, ""))
