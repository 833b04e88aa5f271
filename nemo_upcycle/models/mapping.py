"""THE table Megatron <-> Hugging Face. Import, upcycle and export all read it, and nothing else knows a Megatron name.

A `ParamMapping` says how one Megatron parameter is called and cut, and which Hugging Face tensors are its parts; the
families (`families/`) say how those are called. `sharding.py` turns a mapping into the exact slices that a rank's
shard of the parameter is made of.

Shapes (legend in `architecture.py`): qkv [(H + 2 R) K, D], per key-value group its query heads, then key, then value;
linear_fc1 [2 F, D], gate rows above up rows, each half cut by tensor parallelism on its own; linear_fc2 [D, F].
Biases have the first of these axes. A Mamba layer's in_proj has the rows of z, x, B, C and dt, its convolution those
of x, B and C, one below the other on both sides, each cut on its own.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.families import Family, find_family
from nemo_upcycle.models.hybrid import HybridLayers, LayerPart


if TYPE_CHECKING:
    import torch  # a second and a half, which the planner does without


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
    """

    role: str
    megatron: tuple[str, ...]
    sharding: Sharding
    parts: tuple[str, ...] = ("whole",)
    checkpoint: tuple[str, ...] = ()
    in_layer: bool = True
    hf: tuple[str, ...] = ()
    hf_factor: float = 1.0

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
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
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

MAPPINGS = (*MODEL_MAPPINGS, *ATTENTION_MAPPINGS, *DENSE_MAPPINGS, *MOE_MAPPINGS, *MAMBA_MAPPINGS)
BY_ROLE = {mapping.role: mapping for mapping in MAPPINGS}


_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")


def split_stored(name: str) -> tuple[str | None, str]:
    """Return the layer's number in a name of a distributed checkpoint, and the name inside the layer.

    Args:
        name: a tensor of the model, without the checkpoint's prefix.

    Returns:
        The number as text: "" where layers are stacked, None outside them.
    """
    match = _LAYER.fullmatch(name)
    return (match.group(1) or "", match.group(2)) if match else (None, name)


def find_stored(name: str, *, in_layer: bool) -> ParamMapping | None:
    """Return the table's mapping of a tensor of a distributed checkpoint; None if it has none.

    Args:
        name: the tensor's name inside its layer, or inside the model.
        in_layer: which of the two.
    """
    return next((each for each in MAPPINGS if name in each.stored and each.in_layer is in_layer), None)


def stored_hybrid(names: Collection[str]) -> HybridLayers | None:
    """Return the layers of a HybridModel, as its distributed checkpoint has them; None for a GPTModel's.

    Args:
        names: tensors of the model, without the checkpoint's prefix.

    Raises:
        CheckpointError: a layer is neither attention nor network.
    """
    if BY_ROLE["final_norm"].stored[1] not in names:
        return None
    symbols: dict[int, str] = {}
    for name in names:
        number, inner = split_stored(name)
        if number is None:
            continue
        mapping = find_stored(inner, in_layer=True)
        if mapping is None or mapping in MAMBA_MAPPINGS or not number:
            raise CheckpointError(
                "layers of a HybridModel",
                got=name,
                expected="layers of attention, and of networks, dense or with experts",
                fix="give a model that has no other ones",
            )
        symbol = "*" if mapping.in_attention else "E" if mapping in MOE_MAPPINGS else "-"
        if symbols.get(int(number)) != "E":  # its norm is that of a dense network, too
            symbols[int(number)] = symbol
    return HybridLayers("".join(symbols.get(number, "?") for number in range(1 + max(symbols, default=0))))


def mapping_of(role: str, arch: Architecture) -> ParamMapping:
    """Return a parameter's mapping as it is in this architecture: with its family's names; without a gate, up alone.

    Where no Hugging Face class can hold the model, the parts stand for the names.
    """
    return _mapping_of(role, find_family(arch.hf_class), arch.gated, arch.shared_gate)


@functools.cache
def _mapping_of(role: str, family: Family | None, gated: bool, shared_gate: bool) -> ParamMapping:
    mapping = BY_ROLE[role]
    names = family.names.get(role, mapping.parts) if family else mapping.parts
    factors = family.hf_factors if family and not shared_gate else {}
    mapping = replace(mapping, hf=names, hf_factor=factors.get(role, 1.0))
    if mapping.sharding is Sharding.GATED and not gated:
        return replace(mapping, parts=mapping.parts[1:], hf=names[-1:], sharding=Sharding.NEURON_ROWS)
    return mapping


def layer_mappings(arch: Architecture, layer: int) -> tuple[ParamMapping, ...]:
    """Return the mappings of one layer of `arch`."""
    moe = arch.is_moe_layer(layer)
    mappings = ATTENTION_MAPPINGS + (MOE_MAPPINGS if moe else DENSE_MAPPINGS)
    if arch.mamba:
        kind = arch.parts(layer)
        parts = tuple(mapping for mapping in mappings if mapping.in_attention is (kind == "*"))
        mappings = MAMBA_MAPPINGS if kind == "M" else parts
    return tuple(mapping_of(mapping.role, arch) for mapping in mappings if _has(mapping, arch))


def part_mappings(arch: Architecture, part: LayerPart) -> tuple[ParamMapping, ...]:
    """Return the mappings of a layer of `arch`, or of its attention or its network alone."""
    mappings = layer_mappings(arch, part.layer)
    return tuple(each for each in mappings if part.in_attention in (None, each.in_attention))


def _has(mapping: ParamMapping, arch: Architecture) -> bool:
    """Return whether the architecture has this parameter where a layer of that kind could have it."""
    if mapping.is_shared:  # where the model has no gate, the folder's is a constant of its class
        return arch.shared_ffn_size > 0 and (arch.shared_gate or mapping.role != "shared_gate")
    some = {"query_norm": arch.qk_norm, "key_norm": arch.qk_norm}
    some |= {bias: getattr(arch, bias) for bias in ("qkv_bias", "attention_out_bias", *BALANCING_BIASES)}
    some |= dict.fromkeys(("attention_norm", "ffn_norm"), arch.pre_norm)
    some |= dict.fromkeys(("attention_post_norm", "ffn_post_norm"), arch.post_norm)
    some |= dict.fromkeys(("layer_scale", "kept_ffn_norm"), arch.keeps_network)
    some |= dict.fromkeys(("mamba_conv_bias", "mamba_dt_bias"), True)
    return some.get(mapping.role, arch.ffn_bias if mapping.role.endswith("_bias") else True)


def hf_names(arch: Architecture) -> Iterator[str]:
    """Yield the name of every tensor that a Hugging Face checkpoint of `arch` holds, in the model's order."""
    yield from mapping_of("embedding", arch).hf
    for layer in range(arch.num_layers):
        for mapping in layer_mappings(arch, layer):
            experts = range(arch.num_experts or 0) if mapping.is_expert else range(1)
            hf = mapping.hf[:-1] if mapping.role == "qkv" and arch.at(layer).value_is_key else mapping.hf
            names = dict.fromkeys(hf)
            yield from (name.format(layer=layer, expert=expert) for expert in experts for name in names)
    yield from mapping_of("final_norm", arch).hf
    if not arch.tied_embeddings:
        yield from mapping_of("output", arch).hf


def as_written(arch: Architecture) -> Architecture:
    """Return the architecture that the Hugging Face folder of a model has.

    An MoE model always gets an output matrix of its own, without which SGLang reads no MoE class, vLLM not Glm4-MoE
    and llama.cpp not Qwen2-MoE. SGLang does not say so. A Gemma 4 stays tied, as its class is by default.
    """
    return replace(arch, tied_embeddings=arch.tied_embeddings and (arch.num_experts is None or arch.keeps_network))


def stored_as(mapping: ParamMapping, arch: Architecture) -> ParamMapping:
    """Return the parameter that Megatron has it in: the output matrix of a tied model is the embedding."""
    return mapping_of("embedding", arch) if mapping.role == "output" and arch.tied_embeddings else mapping


def hf_constants(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors that the Hugging Face class wants and Megatron does not have."""
    family = find_family(arch.hf_class)
    return family.constants(arch) if family else {}


def constant_tensors(arch: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the constants of a model's Hugging Face class by name, each one number seen as a whole tensor.

    Where a type does not have a number so small (float16 2**-100), it is the type's smallest.

    Args:
        arch: the model.
        dtype: type of its weights.
    """
    import torch

    family, limits, tensors = find_family(arch.hf_class), torch.finfo(dtype), {}
    values = family.constant_values if family else {}
    for name, shape in hf_constants(arch).items():
        value = next((value for end, value in values.items() if name.endswith(end)), 0.0)
        value = max(value, limits.smallest_normal * limits.eps) if value > 0 else value
        number = torch.tensor(value, dtype=dtype)
        # Bytes of one want a stride.
        tensors[name] = number.reshape(shape) if math.prod(shape) == 1 else number.expand(shape)
    return tensors


def extra_params(arch: Architecture) -> int:
    """Return how many numbers a Hugging Face folder of `arch` holds besides the model's parameters."""
    copied = arch.embedding_params if as_written(arch).tied_embeddings != arch.tied_embeddings else 0
    return copied + sum(math.prod(shape) for shape in hf_constants(arch).values())


def mapping_of_hf(hf_name: str, arch: Architecture) -> tuple[ParamMapping, int, int, int]:
    """Return the mapping of a Hugging Face tensor, the (first) part that it holds, its layer and its expert.

    Raises:
        CheckpointError: the table has no such tensor.
    """
    for mapping, part, pattern in _hf_patterns(find_family(arch.hf_class), arch.gated, arch.shared_gate):
        if match := pattern.fullmatch(hf_name):
            numbers = match.groupdict()
            return mapping, part, int(numbers.get("layer", 0)), int(numbers.get("expert", 0))
    raise CheckpointError(f"{hf_name} is not in the mapping table")


@functools.cache
def _hf_patterns(
    family: Family | None, gated: bool, shared_gate: bool
) -> list[tuple[ParamMapping, int, re.Pattern[str]]]:
    """Return mapping, part and pattern of every Hugging Face name of a family."""
    mappings = [_mapping_of(role, family, gated, shared_gate) for role in (family.names if family else ())]
    return [(mapping, part, _pattern(name)) for mapping in mappings for part, name in enumerate(mapping.hf)]


def _pattern(template: str) -> re.Pattern[str]:
    """Make a pattern that matches a name with numbers in the place of `{layer}` and `{expert}`."""
    return re.compile(re.sub(r"\\\{(layer|expert)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


@functools.cache
def find_mapping(name: str, *, in_layer: bool) -> tuple[ParamMapping, int | None] | None:
    """Return the table's mapping of a Megatron parameter and the expert number in its name; None if it has none.

    Args:
        name: the parameter's name inside its layer, or inside the model.
        in_layer: which of the two.

    Example:
        >>> mapping, expert = find_mapping("mlp.experts.local_experts.3.linear_fc2.weight", in_layer=True)
        >>> mapping.role, expert
        ('expert_fc2', 3)
    """
    for mapping, pattern in _megatron_patterns(in_layer):
        if match := pattern.fullmatch(name):
            return mapping, int(match["expert"]) if match.groups() else None
    return None


@functools.cache
def _megatron_patterns(in_layer: bool) -> list[tuple[ParamMapping, re.Pattern[str]]]:
    """Compile the patterns of `find_mapping` once: a model has thousands of names."""
    mappings = [mapping for mapping in MAPPINGS if mapping.in_layer is in_layer]
    return [(mapping, _pattern(template)) for mapping in mappings for template in mapping.megatron]
