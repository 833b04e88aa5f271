"""The only mapping table between Megatron and Hugging Face: import, upcycling and export all read it.

No other file knows a Megatron name. A `ParamMapping` says which names one Megatron parameter has, how it is cut, and
which Hugging Face tensors are its parts. The families (`families/`) give the names of these tensors. `mapping.py`
finds the rows of a model, and `sharding.py` turns a row into the exact slices that make up a rank's shard of the
parameter.

Shapes (legend in `architecture.py`):

- qkv [(H + 2 R) K, D]: for each key-value group, first the query heads, then key, then value. With gated attention
  [(2 H + 2 R) K, D]: the gates of a group's heads come after its query heads.
- linear_fc1 [2 F, D]: gate rows above up rows. Tensor parallelism cuts each half separately.
- linear_fc2 [D, F].
- A bias has only the first axis of its matrix.
- Mamba layer: in_proj has the rows of z, x, B, C and dt, and the convolution has the rows of x, B and C.
- Gated delta net: in_proj has the rows of query, key, value, z, beta and alpha, and the convolution has the rows of
  query, key and value.

The parts of Mamba layers and gated delta nets lie one below the other, in Megatron and in Hugging Face. Each part is
cut separately.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum


class Sharding(Enum):
    """How tensor parallelism cuts a parameter. Networks are cut by neuron, attention by key-value group."""

    REPLICATED = "replicated"  #: whole on every rank
    VOCABULARY = "vocabulary"  #: rows [V, D], padded at the end so that all ranks have the same number
    QKV = "qkv"  #: rows, by key-value group
    NEURON_ROWS = "neuron rows"  #: rows of one matrix, by neuron (a network without a gate)
    GATED = "gated"  #: rows of gate and rows of up, cut separately, by neuron
    NEURON_COLUMNS = "neuron columns"  #: columns, by neuron
    COLUMNS = "columns"  #: columns, by head
    PARTS = "parts"  #: rows of each part, cut separately, by head or group of heads


@dataclass(frozen=True)
class ParamMapping:
    """One parameter: its names in Megatron and Hugging Face, and how it is cut.

    Args:
        role: role of the parameter. An expert's role is the dense role with the prefix `expert_` or `shared_`. A norm
            before a dense network that is kept beside experts has the prefix `kept_`.
        megatron: names of the parameter, inside the layer if it belongs to a layer, else inside the model. There are
            several names if layer specs differ (Transformer Engine's first, then the local spec's) or if model
            classes differ.
        sharding: how tensor parallelism cuts the parameter.
        parts: tensors that Megatron fuses into the parameter, in this order.
        checkpoint: names in a Megatron distributed checkpoint, if they differ from `megatron` (there, experts are
            stacked, and the local spec saves its norms under Transformer Engine's names).
        in_layer: whether the parameter belongs to a layer.
        hf: Hugging Face names, one for each part. Parts with the same name lie in one tensor, one below the other.
            The names depend on the family, and `mapping_of` sets them for an architecture.
        hf_factors: factor on each part of the Megatron parameter to get the Hugging Face tensors, set like `hf`.
        hf_offset: number to add to the Megatron parameter before it is multiplied, set like `hf`.
    """

    role: str
    megatron: tuple[str, ...]
    sharding: Sharding
    parts: tuple[str, ...] = ("whole",)
    checkpoint: tuple[str, ...] = ()
    in_layer: bool = True
    hf: tuple[str, ...] = ()
    hf_factors: tuple[float, ...] = ()
    hf_offset: float = 0.0

    @functools.cached_property
    def is_expert(self) -> bool:
        """Whether every routed expert has this parameter, cut by expert-tensor parallelism."""
        return self.role.startswith("expert_")

    @property
    def is_shared(self) -> bool:
        """Whether the parameter belongs to the shared experts, which Megatron fuses into one network."""
        return self.role.startswith("shared_")

    @property
    def in_attention(self) -> bool:
        """Whether the parameter belongs to a layer's attention, which is a separate layer in a HybridModel."""
        return self.megatron[0].startswith("self_attention.")

    @property
    def dense_role(self) -> str:
        """Role of the dense network's parameter from which an expert's parameter is made."""
        return self.role.removeprefix("expert_").removeprefix("shared_").removeprefix("kept_")

    def together(self, part: int) -> tuple[int, ...]:
        """Return all parts in the Hugging Face tensor that holds a part, in the order of the rows."""
        return tuple(other for other, name in enumerate(self.hf) if name == self.hf[part])

    @property
    def stored(self) -> tuple[str, ...]:
        """The names to look for in a distributed checkpoint."""
        return self.checkpoint or self.megatron

    @property
    def stored_parts(self) -> tuple[str, ...]:
        """Suffixes of the stored names: parts that are cut separately are stored as separate tensors."""
        is_split = self.sharding is Sharding.PARTS and len(self.parts) > 1
        return tuple(f".{part}" for part in self.parts) if is_split else ("",)


_GATE_UP = ("gate", "up")

#: Parameters outside the layers.
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

#: Parameters of attention and norms, in dense and MoE layers.
ATTENTION_MAPPINGS = (
    ParamMapping(
        "attention_norm",
        # The last name is for a gated delta net.
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
    ParamMapping("sinks", ("self_attention.core_attention.softmax_offset",), Sharding.PARTS, ("heads",)),
    ParamMapping("query_norm", ("self_attention.q_layernorm.weight",), Sharding.REPLICATED),
    ParamMapping("key_norm", ("self_attention.k_layernorm.weight",), Sharding.REPLICATED),
    ParamMapping("attention_post_norm", ("post_self_attn_layernorm.weight",), Sharding.REPLICATED),
    ParamMapping("ffn_norm", ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"), Sharding.REPLICATED),
    ParamMapping("ffn_post_norm", ("post_mlp_layernorm.weight",), Sharding.REPLICATED),
    ParamMapping("layer_scale", ("layer_scalar",), Sharding.REPLICATED),
)

#: Parameters of the network of a dense layer. A network without a gate has only the up projection.
DENSE_MAPPINGS = (
    ParamMapping("fc1", ("mlp.linear_fc1.weight",), Sharding.GATED, _GATE_UP),
    ParamMapping("fc1_bias", ("mlp.linear_fc1.bias",), Sharding.GATED, _GATE_UP),
    ParamMapping("fc2", ("mlp.linear_fc2.weight",), Sharding.NEURON_COLUMNS, ("down",)),
    ParamMapping("fc2_bias", ("mlp.linear_fc2.bias",), Sharding.REPLICATED, ("down",)),
)


def _expert(role: str, name: str, sharding: Sharding, parts: tuple[str, ...]) -> ParamMapping:
    """Make the mapping of an expert's parameter.

    TEGroupedMLP numbers its weights, SequentialMLP its modules. Both save the same stacked tensors.
    """
    megatron = (f"mlp.experts.{name}{{expert}}", f"mlp.experts.local_experts.{{expert}}.{name}")
    return ParamMapping(role, megatron, sharding, parts, checkpoint=(f"mlp.experts.experts.{name}",))


#: Parameters of router and experts of an MoE layer.
MOE_MAPPINGS = (
    ParamMapping("router", ("mlp.router.weight",), Sharding.REPLICATED),
    ParamMapping("router_bias", ("mlp.router.bias",), Sharding.REPLICATED),
    ParamMapping("balancing_bias", ("mlp.router.expert_bias",), Sharding.REPLICATED),  # a buffer, zero at first
    ParamMapping("quantile_bias", ("mlp.router.qb_beta",), Sharding.REPLICATED),  # a buffer, in Megatron-Core 0.19+
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

#: Parameters of a gated delta net, except the norm before it.
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
