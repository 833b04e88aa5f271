"""Find a model's rows of the mapping table by architecture, by Megatron's names or by Hugging Face's names."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.families import Family, find_family
from nemo_upcycle.models.families.base import LEARNABLE, WITHOUT_EFFECT
from nemo_upcycle.models.folding import Fold, folds
from nemo_upcycle.models.hybrid import HybridLayers, LayerPart
from nemo_upcycle.models.mapping_table import (
    ATTENTION_MAPPINGS,
    BY_ROLE,
    DELTA_MAPPINGS,
    DENSE_MAPPINGS,
    MAMBA_MAPPINGS,
    MAPPINGS,
    MOE_MAPPINGS,
    ParamMapping,
    Sharding,
)


if TYPE_CHECKING:
    import torch  # importing torch takes 1.5 s, and the planner does not need torch


_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")


def split_stored(name: str) -> tuple[str | None, str]:
    """Split a tensor name of a distributed checkpoint into layer number and name inside the layer.

    Args:
        name: name of a tensor of the model, without the checkpoint's prefix.

    Returns:
        The layer number as text ("" if the layers are stacked, None outside the layers), and the name.
    """
    match = _LAYER.fullmatch(name)
    return (match.group(1) or "", match.group(2)) if match else (None, name)


def find_stored(name: str, *, in_layer: bool) -> ParamMapping | None:
    """Return the mapping of a tensor of a distributed checkpoint; None if the table has no row.

    Args:
        name: name of the tensor inside its layer, or inside the model.
        in_layer: whether `name` is inside a layer.
    """
    return next((each for each in MAPPINGS if name in each.stored and each.in_layer is in_layer), None)


def stored_hybrid(names: Collection[str]) -> HybridLayers | None:
    """Return the layers of the HybridModel in a distributed checkpoint; None for a GPTModel.

    Args:
        names: names of the model's tensors, without the checkpoint's prefix.

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
                f"Layer {name}",
                kind="refused",
                got="is neither attention nor a network",
                fix="give a HybridModel with only attention and network layers",
            )
        symbol = "*" if mapping.in_attention else "E" if mapping in MOE_MAPPINGS else "-"
        if symbols.get(int(number)) != "E":  # the norm of an MoE layer has the same name as in a dense layer
            symbols[int(number)] = symbol
    return HybridLayers("".join(symbols.get(number, "?") for number in range(1 + max(symbols, default=0))))


def mapping_of(role: str, arch: Architecture) -> ParamMapping:
    """Return the mapping of a role in an architecture, with the tensor names of its family.

    A network without a gate has only the up part. If no Hugging Face class can hold the model, the names of the parts
    are used instead of tensor names.
    """
    family = find_family(arch.hf_class)
    return _mapping_of(role, family, arch.gated, arch.shared_gate, folds(arch))


@functools.cache
def _mapping_of(
    role: str, family: Family | None, gated: bool, shared_gate: bool, folded: tuple[Fold, ...]
) -> ParamMapping:
    mapping = BY_ROLE[role]
    names = family.names.get(role, mapping.parts) if family else mapping.parts
    factors = family.hf_factors if family and not shared_gate else {}
    offset = family.hf_offsets.get(role, 0.0) if family else 0.0
    mine = [fold for fold in folded if role in fold.roles]
    offset += sum(fold.offset for fold in mine)
    factor = math.prod((fold.factor for fold in mine), start=factors.get(role, 1.0))
    others = 1.0 if mapping.sharding is Sharding.QKV else factor  # a factor of attention is for the query alone
    all_factors = (factor, *[others] * (len(mapping.parts) - 1))
    mapping = replace(mapping, hf=names, hf_factors=all_factors, hf_offset=offset)
    if mapping.sharding is Sharding.GATED and not gated:
        return replace(mapping, parts=mapping.parts[1:], hf=names[-1:], sharding=Sharding.NEURON_ROWS)
    return mapping


def layer_mappings(arch: Architecture, layer: int) -> tuple[ParamMapping, ...]:
    """Return the mappings of one layer of `arch`."""
    moe = arch.is_moe_layer(layer)
    mappings = ATTENTION_MAPPINGS + (MOE_MAPPINGS if moe else DENSE_MAPPINGS)
    kind = arch.parts(layer)
    if "G" in kind:
        kept = (each for each in mappings if not each.in_attention or each.role == "attention_norm")
        mappings = (*kept, *DELTA_MAPPINGS)
    if arch.mamba:
        parts = tuple(mapping for mapping in mappings if mapping.in_attention is (kind == "*"))
        mappings = MAMBA_MAPPINGS if kind == "M" else parts
    return tuple(mapping_of(mapping.role, arch) for mapping in mappings if _has(mapping, arch))


def part_mappings(arch: Architecture, part: LayerPart) -> tuple[ParamMapping, ...]:
    """Return the mappings of a layer of `arch`, or only of its attention or its network."""
    mappings = layer_mappings(arch, part.layer)
    return tuple(each for each in mappings if part.in_attention in (None, each.in_attention))


def _has(mapping: ParamMapping, arch: Architecture) -> bool:
    """Return whether an architecture has a parameter that is optional in this kind of layer."""
    if mapping.is_shared:  # if the model has no gate, the gate in the folder is a constant of the class
        return arch.shared_ffn_size > 0 and (arch.shared_gate or mapping.role != "shared_gate")
    some = {"query_norm": arch.qk_norm, "key_norm": arch.qk_norm}
    some |= {bias: getattr(arch, bias) for bias in ("qkv_bias", "attention_out_bias", *BALANCING_BIASES)}
    some |= dict.fromkeys(("attention_norm", "ffn_norm"), arch.pre_norm)
    some |= dict.fromkeys(("attention_post_norm", "ffn_post_norm"), arch.post_norm)
    some |= dict.fromkeys(("layer_scale", "kept_ffn_norm"), arch.keeps_network)
    some["sinks"] = arch.softmax_type == LEARNABLE
    some |= dict.fromkeys(("mamba_conv_bias", "mamba_dt_bias", "delta_dt_bias"), True)
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
    """Return the architecture of a model's Hugging Face folder.

    An MoE model always gets its own output matrix. Without this matrix, SGLang cannot read any MoE class (and shows no
    error), vLLM cannot read Glm4-MoE, and llama.cpp cannot read Qwen2-MoE. Only Gemma 4 keeps the tied embedding,
    which is the default of its class. Settings that the class lacks are folded into the weights.
    """
    tied = arch.tied_embeddings and (arch.num_experts is None or arch.keeps_network)
    return replace(arch, tied_embeddings=tied, **{fold.setting: WITHOUT_EFFECT[fold.setting] for fold in folds(arch)})


def stored_as(mapping: ParamMapping, arch: Architecture) -> ParamMapping:
    """Return the mapping under which Megatron stores a parameter: a tied output matrix is the embedding."""
    return mapping_of("embedding", arch) if mapping.role == "output" and arch.tied_embeddings else mapping


def hf_constants(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the constant tensors that the Hugging Face class needs and Megatron lacks: name -> shape."""
    family = find_family(arch.hf_class)
    return family.constants(arch) if family else {}


def constant_tensors(arch: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the constants of a model's Hugging Face class by name, each as a single number expanded to a tensor.

    A number that is too small for the type (2**-100 in float16) becomes the type's smallest number.

    Args:
        arch: architecture of the model.
        dtype: type of the model's weights.
    """
    import torch

    family, limits, tensors = find_family(arch.hf_class), torch.finfo(dtype), {}
    values = family.constant_values if family else {}
    for name, shape in hf_constants(arch).items():
        value = next((value for end, value in values.items() if name.endswith(end)), 0.0)
        value = max(value, limits.smallest_normal * limits.eps) if value > 0 else value
        number = torch.tensor(value, dtype=dtype)
        # The writer views the bytes of a tensor, and a single element needs a stride of 1 for this.
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
    family = find_family(arch.hf_class)
    for mapping, part, pattern in _hf_patterns(family, arch.gated, arch.shared_gate, folds(arch)):
        if match := pattern.fullmatch(hf_name):
            numbers = match.groupdict()
            return mapping, part, int(numbers.get("layer", 0)), int(numbers.get("expert", 0))
    raise CheckpointError(f"{hf_name} is not in the mapping table.")


@functools.cache
def _hf_patterns(
    family: Family | None, gated: bool, shared_gate: bool, folded: tuple[Fold, ...]
) -> list[tuple[ParamMapping, int, re.Pattern[str]]]:
    """Return mapping, part and pattern of every Hugging Face name of a family."""
    roles = family.names if family else ()
    mappings = [_mapping_of(role, family, gated, shared_gate, folded) for role in roles]
    return [(mapping, part, _pattern(name)) for mapping in mappings for part, name in enumerate(mapping.hf)]


def _pattern(template: str) -> re.Pattern[str]:
    """Compile a pattern that matches a name with numbers for `{layer}` and `{expert}`."""
    return re.compile(re.sub(r"\\\{(layer|expert)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


@functools.cache
def find_mapping(name: str, *, in_layer: bool) -> tuple[ParamMapping, int | None] | None:
    """Return the mapping of a Megatron parameter and the expert number in its name; None if the table has no row.

    Args:
        name: name of the parameter inside its layer, or inside the model.
        in_layer: whether `name` is inside a layer.

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
