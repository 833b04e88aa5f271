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
    """The attention heads of layers without a window, if they differ from the heads of the other layers (Gemma 4).

    Args:
        head_dim: K of these layers.
        num_kv_heads: their R.
        value_is_key: whether the projection of keys gives the values, too.
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
        rope_scaling: scaling of the frequencies, as `config.json` has it; None: none.
        local_rope_theta: base in layers with a window, unscaled; None: the same in all layers.
        rope_pattern: layers whose heads are rotated; None: all.
        rotary_percent: rotated part of a head, its first numbers; 1: all of it.
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
        """Whether each layer computes its own frequencies, because Megatron's models cannot."""
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
        wide_qk_norm: whether they are normalised over all heads at once instead.
        attention_multiplier: factor on the products of query and key; None: one over the root of K.
        sliding_window: tokens that attention sees, the current one included; None: all before it.
        window_pattern: layers with the window; None: all.
        output_gate: whether the output is multiplied by a gate, made of the input as the query is.
        global_heads: heads of layers without a window; None: the same in all.
        value_is_key: whether the projection of keys gives the values, too.
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
    output_gate: bool = False
    global_heads: GlobalHeads | None = None
    value_is_key: bool = False

    @property
    def softmax_scale(self) -> float:
        """The factor on the products of query and key."""
        return 1 / math.sqrt(self.head_dim) if self.attention_multiplier is None else self.attention_multiplier

    @property
    def window(self) -> int | None:
        """The sliding window, in tokens; None where no sequence is longer."""
        return self.sliding_window if self.sliding_window and self.sliding_window < self.max_positions else None

    def window_of(self, layer: int) -> int | None:
        """Return the tokens that a layer's attention sees; None for all."""
        return self.sliding_window if self.window_pattern is None or self.window_pattern[layer] else None


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The norms around attention and network.

    Args:
        pre_norm: whether there are norms before attention and network.
        post_norm: whether there are norms after them.
        zero_centered_norm: whether norms store their distance from one.
        norm_eps: number added to the variance.
    """

    pre_norm: bool = True
    post_norm: bool = False
    zero_centered_norm: bool = False
    norm_eps: float = 1e-5

    @property
    def norm_places(self) -> tuple[bool, bool]:
        """Whether there are norms before attention and network; whether there are norms after them."""
        return self.pre_norm, self.post_norm


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Factors at both ends of a model and on the output of each part, as Granite and Gemma have them.

    Args:
        scaled_embedding: whether the embedding is multiplied by the root of D.
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
        shared_ffn_size: F of all shared experts together; 0 without.
        shared_gate: whether a gate, from 0 to 1 for each token, multiplies the output of the shared experts.
        moe_pattern: layers with experts; None: all, if there are experts.
        norm_topk: whether the weights of the chosen experts are made to sum to one.
        router_score: function of the router's logits, as in `UpcycleSpec`.
        routed_scaling_factor: factor on the weights of the chosen experts.
        balancing_bias: whether every routed expert has a bias that counts when experts are chosen, and that a training
            moves to balance them (arXiv 2408.15664). It is no parameter.
        quantile_bias: whether it has a bias that is a quantile of its logits instead.
        keeps_network: whether its layers are Gemma 4's: one with experts keeps the dense network beside them, each
            with norms of its own, and every layer's output has a factor.
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
        """The kind of its routers."""
        return find_router_kind(self.router_score, pre_softmax=not self.norm_topk)

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return bool(self.num_experts) and (self.moe_pattern is None or self.moe_pattern[layer])
