"""The parts of an architecture: token mixers, rotary embedding, attention, norms, factors and experts.

`architecture.py` explains the letters. An `Architecture` inherits every part. A function that needs one part takes
that part as its argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_upcycle.spec import RouterKind, find_router_kind


@dataclass(frozen=True, kw_only=True)
class MambaLayers:
    """Mamba-2 layers of a model like Nemotron-H, whose layers are Mamba, attention or feed-forward network.

    Args:
        pattern: kind of each layer of the dense model: `M` (Mamba-2), `*` (attention) or `-` (network).
        num_heads: number of heads in a Mamba layer.
        head_dim: size of a head.
        num_groups: number of groups of heads that share B and C.
        state_size: size of the state (`ssm_state_size`).
    """

    #: Number of tokens that the convolution before the scan sees. Megatron-Core supports no other number.
    conv_size: ClassVar[int] = 4

    pattern: str
    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int

    def rows(self, part: str) -> int:
        """Count the rows of a part: `z`, `x`, `B`, `C`, or a part with one row per head, such as `dt`."""
        states = self.num_groups * self.state_size
        sizes = dict.fromkeys("zx", self.num_heads * self.head_dim) | dict.fromkeys("BC", states)
        return sizes.get(part, self.num_heads)

    def params(self, hidden_size: int) -> int:
        """Count the parameters of one Mamba layer: projections, convolution, inner norm, A, D and dt.

        The norm before the layer [hidden_size] does not count.
        """
        z, x, b, c, dt = (self.rows(part) for part in ("z", "x", "B", "C", "dt"))
        return (z + 2 * x + b + c + dt) * hidden_size + (x + b + c) * (self.conv_size + 1) + x + 3 * dt


@dataclass(frozen=True, kw_only=True)
class DeltaLayers:
    """Gated delta nets (arXiv 2412.06464), which replace attention in some layers, as in Qwen3.5.

    Args:
        pattern: whether each layer has a gated delta net.
        num_key_heads: number of heads of query and key.
        num_value_heads: number of heads of the value, and of every tensor with one number per head.
        key_dim: size of a query or key head.
        value_dim: size of a value head.
        conv_size: number of tokens that the convolution of query, key and value sees.
    """

    #: Number of tokens that the delta rule processes at once.
    chunk_size: ClassVar[int] = 64

    pattern: tuple[bool, ...]
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_size: int = 4

    def rows(self, part: str) -> int:
        """Count the rows of a part: `query`, `key`, `value`, the gate `z`, or a part with one row per head."""
        sizes = dict.fromkeys(("query", "key"), self.num_key_heads * self.key_dim)
        sizes |= dict.fromkeys(("value", "z"), self.num_value_heads * self.value_dim)
        return sizes.get(part, self.num_value_heads)

    def params(self, hidden_size: int) -> int:
        """Count the parameters of one gated delta net: projections, convolution, inner norm, A and dt.

        The norm before the net [D] does not count.
        """
        key, value, heads = (self.rows(part) for part in ("key", "value", "heads"))
        convolution = (2 * key + value) * self.conv_size
        return (2 * key + 3 * value + 2 * heads) * hidden_size + convolution + self.value_dim + 2 * heads


@dataclass(frozen=True, kw_only=True)
class GlobalHeads:
    """The attention heads of layers without a window, if they differ from the heads of the other layers (Gemma 4).

    Args:
        head_dim: K of these layers.
        num_kv_heads: R of these layers.
        value_is_key: whether the key projection also computes the values.
    """

    head_dim: int
    num_kv_heads: int
    value_is_key: bool


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary embedding.

    Args:
        head_dim: K.
        rope_theta: base of the frequencies.
        rope_scaling: scaling of the frequencies, as in `config.json`; None for no scaling.
        local_rope_theta: base in layers with a window, whose frequencies are not scaled; None if all layers have the
            same base.
        rope_pattern: layers whose heads are rotated; None for all layers.
        rotary_percent: rotated share of a head, counted from the head's first number; 1 for the whole head.
        max_positions: longest sequence (tokens).
    """

    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)  # a dict has no hash
    local_rope_theta: float | None = None
    rope_pattern: tuple[bool, ...] | None = None
    rotary_percent: float = 1.0
    max_positions: int = 4096

    @property
    def scales_in_layers(self) -> bool:
        """Whether each layer computes its rotary frequencies itself, as Megatron's models cannot."""
        return self.local_rope_theta is not None or (self.rope_scaling or {}).get("rope_type") in ("yarn", "linear")


@dataclass(frozen=True, kw_only=True)
class Attention(Rope):
    """Attention, with its rotary embedding.

    Args:
        num_heads: H.
        num_kv_heads: R.
        qkv_bias: whether query, key and value have biases.
        attention_out_bias: whether the output has a bias.
        qk_norm: whether query and key are normalised before the rotary embedding, head by head.
        wide_qk_norm: whether query and key are normalised over all heads at once instead of head by head.
        attention_multiplier: factor on the products of query and key; None for 1 / sqrt(K).
        sliding_window: number of tokens that attention sees, including the current token; None for all earlier tokens.
        window_pattern: layers with the window; None for all layers.
        softmax_type: Megatron's kind of softmax: `vanilla`, or `learnable` if every head has an attention sink, a
            number that the softmax takes as one more score.
        output_gate: whether the output is multiplied by a gate. The gate is projected from the input, like the query.
        global_heads: heads of layers without a window; None if all layers have the same heads.
        value_is_key: whether the key projection also computes the values.
    """

    num_heads: int
    num_kv_heads: int
    qkv_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    attention_multiplier: float | None = None
    sliding_window: int | None = None
    window_pattern: tuple[bool, ...] | None = None
    softmax_type: str = "vanilla"
    output_gate: bool = False
    global_heads: GlobalHeads | None = None
    value_is_key: bool = False

    @property
    def softmax_scale(self) -> float:
        """The factor on the products of query and key."""
        return 1 / math.sqrt(self.head_dim) if self.attention_multiplier is None else self.attention_multiplier

    @property
    def window(self) -> int | None:
        """The sliding window (tokens); None if no sequence is longer than the window."""
        return self.sliding_window if self.sliding_window and self.sliding_window < self.max_positions else None

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens a layer's attention sees; None for all."""
        return self.sliding_window if self.window_pattern is None or self.window_pattern[layer] else None


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The norms around attention and network.

    Args:
        pre_norm: whether there are norms before attention and network.
        post_norm: whether there are norms after attention and network.
        zero_centered_norm: whether norms store their distance from one.
        norm_eps: number added to the variance.
    """

    pre_norm: bool = True
    post_norm: bool = False
    zero_centered_norm: bool = False
    norm_eps: float = 1e-5

    @property
    def norm_places(self) -> tuple[bool, bool]:
        """The pair (`pre_norm`, `post_norm`)."""
        return self.pre_norm, self.post_norm


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Factors at both ends of a model and on the output of each part, as Granite and Gemma have them.

    Args:
        scaled_embedding: whether the embedding is multiplied by sqrt(D).
        embedding_multiplier: factor on the embedding.
        residual_multiplier: factor on what attention and network add to their input.
        logits_scaling: divisor of the logits.
    """

    scaled_embedding: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts and their router; a dense model has the defaults.

    Args:
        num_experts: E; None in a dense model.
        top_k: experts that process a token.
        expert_ffn_size: F of one routed expert; None in a dense model.
        shared_ffn_size: F of all shared experts together; 0 for no shared experts.
        shared_gate: whether a gate, from 0 to 1 for each token, multiplies the output of the shared experts.
        moe_pattern: layers with experts; None for all layers of a model with experts.
        norm_topk: whether the weights of the chosen experts are normalised to sum to one.
        router_score: function applied to the router's logits, as in `UpcycleSpec`.
        routed_scaling_factor: factor on the weights of the chosen experts.
        balancing_bias: whether every routed expert has a bias that balances the expert load (arXiv 2408.15664). The
            router uses the bias only to choose experts. Training moves the bias, but the bias is a buffer, not a
            parameter.
        quantile_bias: whether every routed expert has a bias that is a quantile of the expert's logits.
        keeps_network: whether the layers are built like Gemma 4's. An MoE layer then keeps the dense network beside
            the experts, and the network and the experts have separate norms. Every layer multiplies its output by a
            factor.
    """

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
    keeps_network: bool = False

    @property
    def router_kind(self) -> RouterKind:
        """The kind of the model's routers."""
        return find_router_kind(self.router_score, pre_softmax=not self.norm_topk)

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return bool(self.num_experts) and (self.moe_pattern is None or self.moe_pattern[layer])
