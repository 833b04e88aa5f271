"""THE table Megatron <-> Hugging Face. Import, upcycle and export all read it, and nothing else knows a Megatron name.

A `ParamMapping` says how one Megatron parameter is called and cut, and which Hugging Face tensors are its parts; the
families (`families/`) say how those are called. `mapping.py` finds a model's rows in it, `sharding.py` turns one into
the exact slices that a rank's shard of the parameter is made of.

Shapes (legend in `architecture.py`): qkv [(H + 2 R) K, D], per key-value group its query heads, then key, then value;
with a gate of attention [(2 H + 2 R) K, D], the gates of a group's heads behind its query heads; linear_fc1 [2 F, D],
gate rows above up rows, each half cut by tensor parallelism on its own; linear_fc2 [D, F]. Biases have the first of
these axes. A Mamba layer's in_proj has the rows of z, x, B, C and dt, its convolution those of x, B and C; a gated
delta net's those of query, key, value, z, beta and alpha, and of the first three: one below the other on both sides,
each cut on its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum


class Sharding(Enum):
    """How tensor parallelism cuts a parameter. Networks are cut by neuron, attention by key-value group."""

    REPLICATED = "replicated"  #: whole on every rank
    VOCABULARY = "vocabulary"  #: rows [V, D], padded at the end so that every rank has as many
    QKV = "qkv"  #: rows, by key-value group
    NEURON_ROWS = "neuron rows"  #: rows of one matrix, by neuron (a network without a gate)
    GATED = "gated"  #: rows of gate and up, each on its own, by neuron
    NEURON_COLUMNS = "neuron columns"  #: columns, by neuron
    COLUMNS = "columns"  #: columns, by head
    PARTS = "parts"  #: rows of each part on its own, by head or group of heads


@dataclass(frozen=True)
class ParamMapping:
    """One parameter: its names on both sides and how it is cut.

    Args:
        role: what it is. An expert's role is the dense role behind `expert_` or `shared_`, or, of a norm, `kept_`.
        megatron: parameter names, inside the layer for what every layer has, else inside the model. More than one
            where layer specs differ: first Transformer Engine's, then the local spec's; or where model classes do.
        sharding: how tensor parallelism cuts it.
        parts: the tensors that Megatron fuses into it, in their order.
        checkpoint: names in a Megatron distributed checkpoint, where they differ (experts are stacked there; the local
            spec saves its norms under Transformer Engine's names).
        in_layer: whether it belongs to a layer.
        hf: Hugging Face names, one for each part; parts of one name lie in one tensor, rows below rows. Of one
            architecture only, see `mapping_of`: the family has them.
        hf_factor: factor on the Megatron parameter in the Hugging Face tensors, as for `hf`.
        hf_offset: what is added to it there.
    """

    role: str
    megatron: tuple[str, ...]
    sharding: Sharding
    parts: tuple[str, ...] = ("whole",)
    checkpoint: tuple[str, ...] = ()
    in_layer: bool = True
    hf: tuple[str, ...] = ()
    hf_factor: float = 1.0
    hf_offset: float = 0.0

    @functools.cached_property
    def is_expert(self) -> bool:
        """Whether every routed expert has this parameter, cut by expert-tensor parallelism."""
        return self.role.startswith("expert_")

    @property
    def is_shared(self) -> bool:
        """Whether it belongs to the shared experts, which Megatron fuses into one network."""
        return self.role.startswith("shared_")

    @property
    def in_attention(self) -> bool:
        """Whether it belongs to a layer's attention, which is a layer of its own in a HybridModel."""
        return self.megatron[0].startswith("self_attention.")

    @property
    def dense_role(self) -> str:
        """The dense network's parameter that an expert's is made from."""
        return self.role.removeprefix("expert_").removeprefix("shared_").removeprefix("kept_")

    def together(self, part: int) -> tuple[int, ...]:
        """Return the parts that lie in the Hugging Face tensor of one, that one included, in the order of its rows."""
        return tuple(other for other, name in enumerate(self.hf) if name == self.hf[part])

    @property
    def stored(self) -> tuple[str, ...]:
        """The names to look for in a distributed checkpoint."""
        return self.checkpoint or self.megatron

    @property
    def stored_parts(self) -> tuple[str, ...]:
        """How the names go on there: parts that are cut each on its own are tensors of their own."""
        is_split = self.sharding is Sharding.PARTS and len(self.parts) > 1
        return tuple(f".{part}" for part in self.parts) if is_split else ("",)


_GATE_UP = ("gate", "up")

#: Outside the layers.
MODEL_MAPPINGS = (
    ParamMapping("embedding", ("embedding.word_embeddings.weight",), Sharding.VOCABULARY, in_layer=False),
    ParamMapping(
        "final_norm",
        ("decoder.final_layernorm.weight", "decoder.final_norm.weight"),  # GPTModel, HybridModel
        Sharding.REPLICATED,
        in_layer=False,
    ),
    ParamMapping("output", ("output_layer.weight",), Sharding.VOCABULARY, in_layer=False),
)

#: In every layer, dense or MoE.
ATTENTION_MAPPINGS = (
    ParamMapping(
        "attention_norm",
        # The last one is a gated delta net's.
        (
            "self_attention.linear_qkv.layer_norm_weight",
            "input_layernorm.weight",
            "self_attention.in_proj.layer_norm_weight",
        ),
        Sharding.REPLICATED,
    ),
    ParamMapping("qkv", ("self_attention.linear_qkv.weight",), Sharding.QKV, ("query", "key", "value")),
    ParamMapping("qkv_bias", ("self_attention.linear_qkv.bias",), Sharding.QKV, ("query", "key", "value")),
    ParamMapping("attention_out", ("self_attention.linear_proj.weight",), Sharding.COLUMNS),
    ParamMapping("attention_out_bias", ("self_attention.linear_proj.bias",), Sharding.REPLICATED),
    ParamMapping("query_norm", ("self_attention.q_layernorm.weight",), Sharding.REPLICATED),
    ParamMapping("key_norm", ("self_attention.k_layernorm.weight",), Sharding.REPLICATED),
    ParamMapping("attention_post_norm", ("post_self_attn_layernorm.weight",), Sharding.REPLICATED),
    ParamMapping("ffn_norm", ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"), Sharding.REPLICATED),
    ParamMapping("ffn_post_norm", ("post_mlp_layernorm.weight",), Sharding.REPLICATED),
    ParamMapping("layer_scale", ("layer_scalar",), Sharding.REPLICATED),
)

#: In a dense layer. A network without a gate has its up projection alone.
DENSE_MAPPINGS = (
    ParamMapping("fc1", ("mlp.linear_fc1.weight",), Sharding.GATED, _GATE_UP),
    ParamMapping("fc1_bias", ("mlp.linear_fc1.bias",), Sharding.GATED, _GATE_UP),
    ParamMapping("fc2", ("mlp.linear_fc2.weight",), Sharding.NEURON_COLUMNS, ("down",)),
    ParamMapping("fc2_bias", ("mlp.linear_fc2.bias",), Sharding.REPLICATED, ("down",)),
)


def _expert(role: str, name: str, sharding: Sharding, parts: tuple[str, ...]) -> ParamMapping:
    """TEGroupedMLP numbers its weights, SequentialMLP its modules; both save the same stacked tensors."""
    megatron = (f"mlp.experts.{name}{{expert}}", f"mlp.experts.local_experts.{{expert}}.{name}")
    return ParamMapping(role, megatron, sharding, parts, checkpoint=(f"mlp.experts.experts.{name}",))


#: In an MoE layer.
MOE_MAPPINGS = (
    ParamMapping("router", ("mlp.router.weight",), Sharding.REPLICATED),
    ParamMapping("router_bias", ("mlp.router.bias",), Sharding.REPLICATED),
    ParamMapping("balancing_bias", ("mlp.router.expert_bias",), Sharding.REPLICATED),  # a buffer, zero at first
    ParamMapping("quantile_bias", ("mlp.router.qb_beta",), Sharding.REPLICATED),  # as well, from 0.19 on
    _expert("expert_fc1", "linear_fc1.weight", Sharding.GATED, _GATE_UP),
    _expert("expert_fc1_bias", "linear_fc1.bias", Sharding.GATED, _GATE_UP),
    _expert("expert_fc2", "linear_fc2.weight", Sharding.NEURON_COLUMNS, ("down",)),
    _expert("expert_fc2_bias", "linear_fc2.bias", Sharding.REPLICATED, ("down",)),
    ParamMapping("shared_fc1", ("mlp.shared_experts.linear_fc1.weight",), Sharding.GATED, _GATE_UP),
    ParamMapping("shared_fc2", ("mlp.shared_experts.linear_fc2.weight",), Sharding.NEURON_COLUMNS, ("down",)),
    ParamMapping("shared_gate", ("mlp.shared_experts.gate_weight",), Sharding.REPLICATED),
    ParamMapping("kept_ffn_norm", ("pre_shared_expert_layernorm.weight",), Sharding.REPLICATED),
)

MAMBA_MAPPINGS = (
    ParamMapping("mamba_norm", ("mixer.in_proj.layer_norm_weight", "norm.weight"), Sharding.REPLICATED),
    ParamMapping("mamba_in", ("mixer.in_proj.weight",), Sharding.PARTS, ("z", "x", "B", "C", "dt")),
    ParamMapping("mamba_conv", ("mixer.conv1d_weight",), Sharding.PARTS, ("x", "B", "C")),
    ParamMapping("mamba_conv_bias", ("mixer.conv1d_bias",), Sharding.PARTS, ("x", "B", "C")),
    ParamMapping("mamba_a", ("mixer.A_log",), Sharding.PARTS, ("heads",)),
    ParamMapping("mamba_d", ("mixer.D",), Sharding.PARTS, ("heads",)),
    ParamMapping("mamba_dt_bias", ("mixer.dt_bias",), Sharding.PARTS, ("heads",)),
    ParamMapping("mamba_gated_norm", ("mixer.norm.weight",), Sharding.PARTS, ("x",)),
    ParamMapping("mamba_out", ("mixer.out_proj.weight",), Sharding.COLUMNS),
)

#: Of a gated delta net, beside the norm before it.
DELTA_MAPPINGS = (
    ParamMapping(
        "delta_in",
        ("self_attention.in_proj.weight",),
        Sharding.PARTS,
        ("query", "key", "value", "z", "beta", "alpha"),
    ),
    ParamMapping("delta_conv", ("self_attention.conv1d.weight",), Sharding.PARTS, ("query", "key", "value")),
    ParamMapping("delta_a", ("self_attention.A_log",), Sharding.PARTS, ("heads",)),
    ParamMapping("delta_dt_bias", ("self_attention.dt_bias",), Sharding.PARTS, ("heads",)),
    ParamMapping("delta_norm", ("self_attention.out_norm.weight",), Sharding.REPLICATED),
    ParamMapping("delta_out", ("self_attention.out_proj.weight",), Sharding.COLUMNS),
)

MAPPINGS = (
    *MODEL_MAPPINGS,
    *ATTENTION_MAPPINGS,
    *DENSE_MAPPINGS,
    *MOE_MAPPINGS,
    *MAMBA_MAPPINGS,
    *DELTA_MAPPINGS,
)
BY_ROLE = {mapping.role: mapping for mapping in MAPPINGS}
