"""THE table Megatron <-> Hugging Face. Import, upcycle and export all read it, and nothing else knows a tensor name.

A `ParamMapping` says how one Megatron parameter and its Hugging Face tensors are called and cut; `sharding.py` turns a
mapping into the exact slices that a rank's shard of the parameter is made of.

Shapes (legend in `architecture.py`): qkv [(H + 2 G) K, D], per key-value group its query heads, then key, then value;
linear_fc1 [2 F, D], gate rows above up rows, each half cut by tensor parallelism on its own; linear_fc2 [D, F].
Biases have the first of these axes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture


class Sharding(Enum):
    """How tensor parallelism cuts a parameter. Networks are cut by neuron, attention by key-value group."""

    #: whole on every rank
    REPLICATED = "replicated"
    #: rows [V, D], padded at the end so that every rank has as many
    VOCABULARY = "vocabulary"
    #: rows, by key-value group
    QKV = "qkv"
    #: rows of one matrix, by neuron (a network without a gate)
    NEURON_ROWS = "neuron rows"
    #: rows of gate and up, each on its own, by neuron
    GATED = "gated"
    #: columns, by neuron
    NEURON_COLUMNS = "neuron columns"
    #: columns, by attention head
    COLUMNS = "columns"


@dataclass(frozen=True)
class ParamMapping:
    """One parameter: its names on both sides and how it is cut.

    Args:
        role: what it is. An expert's role is the dense role behind `expert_` or `shared_`.
        megatron: parameter names, inside the layer for what every layer has, else inside the model. More than one
            where layer specs differ: first Transformer Engine's, then the local spec's.
        checkpoint: names in a Megatron distributed checkpoint, where they differ (experts are stacked there; the local
            spec saves its norms under Transformer Engine's names).
        hf: Hugging Face names, in the order in which Megatron fuses them; of experts, Mixtral's.
        cut: how tensor parallelism cuts it.
        qwen2_moe: the names in Qwen2-MoE, where they differ.
    """

    role: str
    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    sharding: Sharding
    checkpoint: tuple[str, ...] = ()
    qwen2_moe: tuple[str, ...] = ()

    @property
    def in_layer(self) -> bool:
        """Whether it belongs to a layer."""
        return "{layer}" in self.hf[0]

    @property
    def is_expert(self) -> bool:
        """Whether every routed expert has this parameter, cut by expert-tensor parallelism."""
        return self.role.startswith("expert_")

    @property
    def is_shared(self) -> bool:
        """Whether it belongs to the shared experts, which Megatron fuses into one network."""
        return self.role.startswith("shared_")

    @property
    def dense_role(self) -> str:
        """The dense network's parameter that an expert's is made from."""
        return self.role.removeprefix("expert_").removeprefix("shared_")

    @property
    def stored(self) -> tuple[str, ...]:
        """The names to look for in a distributed checkpoint."""
        return self.checkpoint or self.megatron

    def names(self, arch: Architecture) -> tuple[str, ...]:
        """Return the Hugging Face names in a model of this architecture."""
        return self.qwen2_moe if self.qwen2_moe and arch.hf_class == "Qwen2MoeForCausalLM" else self.hf


_HF = "model.layers.{layer}."
_MLP = _HF + "mlp."
_MIXTRAL = _HF + "block_sparse_moe.experts.{expert}."
_QWEN2_MOE = _MLP + "experts.{expert}."
_GATE_UP = ("gate", "up")

#: Outside the layers.
MODEL_MAPPINGS = (
    ParamMapping(
        "embedding", ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Sharding.VOCABULARY
    ),
    ParamMapping("final_norm", ("decoder.final_layernorm.weight",), ("model.norm.weight",), Sharding.REPLICATED),
    ParamMapping("output", ("output_layer.weight",), ("lm_head.weight",), Sharding.VOCABULARY),
)

#: In every layer, dense or MoE.
ATTENTION_MAPPINGS = (
    ParamMapping(
        "attention_norm",
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        (_HF + "input_layernorm.weight",),
        Sharding.REPLICATED,
    ),
    ParamMapping(
        "qkv",
        ("self_attention.linear_qkv.weight",),
        tuple(_HF + f"self_attn.{part}_proj.weight" for part in "qkv"),
        Sharding.QKV,
    ),
    ParamMapping(
        "qkv_bias",
        ("self_attention.linear_qkv.bias",),
        tuple(_HF + f"self_attn.{part}_proj.bias" for part in "qkv"),
        Sharding.QKV,
    ),
    ParamMapping(
        "attention_out", ("self_attention.linear_proj.weight",), (_HF + "self_attn.o_proj.weight",), Sharding.COLUMNS
    ),
    ParamMapping(
        "attention_out_bias",
        ("self_attention.linear_proj.bias",),
        (_HF + "self_attn.o_proj.bias",),
        Sharding.REPLICATED,
    ),
    ParamMapping(
        "ffn_norm",
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        (_HF + "post_attention_layernorm.weight",),
        Sharding.REPLICATED,
    ),
)

#: In a dense layer. A network without a gate has its up projection alone.
DENSE_MAPPINGS = (
    ParamMapping(
        "fc1", ("mlp.linear_fc1.weight",), tuple(_MLP + f"{part}_proj.weight" for part in _GATE_UP), Sharding.GATED
    ),
    ParamMapping(
        "fc1_bias", ("mlp.linear_fc1.bias",), tuple(_MLP + f"{part}_proj.bias" for part in _GATE_UP), Sharding.GATED
    ),
    ParamMapping("fc2", ("mlp.linear_fc2.weight",), (_MLP + "down_proj.weight",), Sharding.NEURON_COLUMNS),
    ParamMapping("fc2_bias", ("mlp.linear_fc2.bias",), (_MLP + "down_proj.bias",), Sharding.REPLICATED),
)


def _expert_row(
    fc: int, kind: str, mixtral: tuple[str, ...], qwen: tuple[str, ...], sharding: Sharding
) -> ParamMapping:
    """TEGroupedMLP numbers its weights, SequentialMLP its modules; both save the same stacked tensors."""
    name = f"linear_fc{fc}.{kind}"
    return ParamMapping(
        f"expert_fc{fc}" + ("_bias" if kind == "bias" else ""),
        (f"mlp.experts.{name}{{expert}}", f"mlp.experts.local_experts.{{expert}}.{name}"),
        tuple(_MIXTRAL + f"{part}.{kind}" for part in mixtral),
        sharding,
        (f"mlp.experts.experts.{name}",),
        tuple(_QWEN2_MOE + f"{part}_proj.{kind}" for part in qwen),
    )


#: In an MoE layer.
MOE_MAPPINGS = (
    ParamMapping(
        "router",
        ("mlp.router.weight",),
        (_HF + "block_sparse_moe.gate.weight",),
        Sharding.REPLICATED,
        qwen2_moe=(_MLP + "gate.weight",),
    ),
    ParamMapping("router_bias", ("mlp.router.bias",), (_HF + "block_sparse_moe.gate.bias",), Sharding.REPLICATED),
    _expert_row(1, "weight", ("w1", "w3"), _GATE_UP, Sharding.GATED),
    _expert_row(1, "bias", ("w1", "w3"), _GATE_UP, Sharding.GATED),
    _expert_row(2, "weight", ("w2",), ("down",), Sharding.NEURON_COLUMNS),
    _expert_row(2, "bias", ("w2",), ("down",), Sharding.REPLICATED),
    ParamMapping(
        "shared_fc1",
        ("mlp.shared_experts.linear_fc1.weight",),
        tuple(_MLP + f"shared_expert.{part}_proj.weight" for part in _GATE_UP),
        Sharding.GATED,
    ),
    ParamMapping(
        "shared_fc2",
        ("mlp.shared_experts.linear_fc2.weight",),
        (_MLP + "shared_expert.down_proj.weight",),
        Sharding.NEURON_COLUMNS,
    ),
)

MAPPINGS = (*MODEL_MAPPINGS, *ATTENTION_MAPPINGS, *DENSE_MAPPINGS, *MOE_MAPPINGS)
BY_ROLE = {row.role: row for row in MAPPINGS}


def mapping_of(role: str, arch: Architecture) -> ParamMapping:
    """Return a parameter's row as it is in this architecture: without a gate, up alone."""
    row = BY_ROLE[role]
    if row.sharding is Sharding.GATED and not arch.gated:
        return replace(row, hf=row.hf[1:], qwen2_moe=row.qwen2_moe[1:], sharding=Sharding.NEURON_ROWS)
    return row


def layer_mappings(arch: Architecture, layer: int) -> tuple[ParamMapping, ...]:
    """Return the rows of one layer of `arch`."""
    rows = ATTENTION_MAPPINGS + (MOE_MAPPINGS if arch.is_moe_layer(layer) else DENSE_MAPPINGS)
    return tuple(mapping_of(row.role, arch) for row in rows if _has(row, arch))


def _has(row: ParamMapping, arch: Architecture) -> bool:
    """Return whether the architecture has this parameter where a layer of that kind could have it."""
    if row.is_shared:
        return arch.shared_ffn_size > 0
    biases = {"qkv_bias": arch.qkv_bias, "attention_out_bias": arch.attention_out_bias}
    return biases.get(row.role, arch.ffn_bias if row.role.endswith("_bias") else True)


def hf_names(arch: Architecture) -> Iterator[str]:
    """Yield the name of every tensor that a Hugging Face checkpoint of `arch` holds, in the model's order."""
    for row in MODEL_MAPPINGS:
        if row.role == "output" and arch.tied_embeddings:
            continue
        if row.role == "final_norm":
            for layer in range(arch.num_layers):
                for layer_row in layer_mappings(arch, layer):
                    experts = range(arch.num_experts or 0) if layer_row.is_expert else range(1)
                    names = layer_row.names(arch)
                    yield from (name.format(layer=layer, expert=expert) for expert in experts for name in names)
        yield from row.hf


def hf_constants(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors of zeros that the Hugging Face class wants and Megatron does not have.

    Qwen2-MoE multiplies its shared expert by the sigmoid of a gate: one half, if the gate is zero, which the export
    makes up for in the shared down projection. It has a shared expert always: without one, an expert of no neurons.
    """
    if arch.hf_class != "Qwen2MoeForCausalLM":
        return {}
    gate, none = {"shared_expert_gate": (1, arch.hidden_size)}, {}
    if not arch.shared_ffn_size:
        none = {f"shared_expert.{part}_proj": (0, arch.hidden_size) for part in _GATE_UP}
        none["shared_expert.down_proj"] = (arch.hidden_size, 0)
    layers = [layer for layer in range(arch.num_layers) if arch.is_moe_layer(layer)]
    return {
        f"{_MLP.format(layer=layer)}{name}.weight": shape for layer in layers for name, shape in (none | gate).items()
    }


def mapping_of_hf(hf_name: str, arch: Architecture) -> tuple[ParamMapping, int, int, int]:
    """Return the row of a Hugging Face tensor, the part of it, its layer and its expert.

    Raises:
        CheckpointError: the table has no such tensor.
    """
    numbers = dict(_NUMBER.findall(hf_name))
    row, part = _templates(arch).get(_NUMBER.sub(r".\1.{\1}", hf_name), (None, 0))
    if row is None:
        raise CheckpointError(f"{hf_name} is not in the mapping table")
    return row, part, int(numbers.get("layers", 0)), int(numbers.get("experts", 0))


#: The numbers in a Hugging Face name.
_NUMBER = re.compile(r"\.(layers|experts)\.(\d+)(?=\.)")


@functools.cache
def _templates(arch: Architecture) -> dict[str, tuple[ParamMapping, int]]:
    """Return row and part of every Hugging Face name, numbers left open."""
    rows = [mapping_of(row.role, arch) for row in MAPPINGS]
    named = [(name, (row, part)) for row in rows for part, name in enumerate(row.names(arch))]
    return {name.format(layer="{layers}", expert="{experts}"): found for name, found in named}


@functools.cache
def find_mapping(name: str, *, in_layer: bool) -> tuple[ParamMapping, int | None] | None:
    """Return the row of a Megatron parameter and the expert number in its name; None where the table has none.

    Args:
        name: the parameter's name inside its layer, or inside the model.
        in_layer: which of the two.

    Example:
        >>> row, expert = find_mapping("mlp.experts.local_experts.3.linear_fc2.weight", in_layer=True)
        >>> row.role, expert
        ('expert_fc2', 3)
    """
    for row, pattern in _patterns(in_layer):
        if match := pattern.fullmatch(name):
            return row, int(match.group(1)) if match.groups() else None
    return None


@functools.cache
def _patterns(in_layer: bool) -> list[tuple[ParamMapping, re.Pattern[str]]]:
    """Return what `find_mapping` looks for: compiled once, for a model has thousands of names."""
    number = re.escape("{expert}")
    return [
        (row, re.compile(re.escape(template).replace(number, r"(\d+)")))
        for row in MAPPINGS
        if row.in_layer is in_layer
        for template in row.megatron
    ]
