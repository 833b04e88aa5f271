"""Which of this rank's parameters is made of which slices of the dense checkpoint: the plan, checked as a whole.

Nothing is read or written here, so that a plan can be made for any rank of any cluster on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.mapping import ParamMapping, Sharding, find_mapping, layer_mappings, mapping_of
from nemo_upcycle.models.sharding import Shard, SourceSlice, hf_shape, shard_shape, source_slices
from nemo_upcycle.spec import UpcycleSpec


@dataclass(frozen=True)
class RankCoords:
    """Where a rank stands in the groups that cut tensors and hand out experts."""

    dense: Shard
    expert: Shard
    experts: Shard

    @staticmethod
    def here() -> RankCoords:
        """Return this rank's place, from Megatron's groups."""
        from megatron.core import parallel_state as ps

        return RankCoords(
            Shard(ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()),
            Shard(ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()),
            Shard(ps.get_expert_model_parallel_rank(), ps.get_expert_model_parallel_world_size()),
        )


@dataclass(frozen=True)
class ParamPlan:
    """A parameter of this rank, or the same matrix of those experts of a layer that are made of one dense slice.

    Args:
        names: of the parameters.
        row: what they are, in the upcycled model.
        layer: number in the whole model, from 0; None outside the layers.
        tensors: their data.
        experts: numbers of the experts over all ranks; empty for what is not a routed expert's.
        source: the dense network's row; None for a router.
        pieces: the slices that make up each of the tensors.
        branch: which of several dense sources they come from.
        shard: the rank's place in the group that cuts the row.
        first_neuron: where in the dense network their (unsharded) matrix begins.
    """

    names: tuple[str, ...]
    row: ParamMapping
    layer: int | None
    tensors: tuple[torch.Tensor, ...]
    experts: tuple[int, ...]
    source: ParamMapping | None
    pieces: tuple[SourceSlice, ...]
    branch: int | None
    shard: Shard
    first_neuron: int = 0

    def hf_name(self, part: int) -> str:
        """Return the name of one of the dense tensors that it is made of."""
        assert self.source is not None
        return self.source.hf[part].format(layer=self.layer)


def param_plans(
    model: Any,
    dense: Architecture,
    made: Architecture,
    spec: UpcycleSpec | None,
    place: RankCoords,
    branch_of: Callable[[int], int],
) -> list[ParamPlan]:
    """Return what is to be filled in one model chunk, every parameter exactly once.

    Args:
        model: Megatron's `GPTModel`, also on the meta device.
        dense: the dense checkpoint's architecture.
        made: the model's own.
        spec: how one becomes the other; None for a dense model.
        place: the rank's.
        branch_of: which dense source the experts of a copy of the network come from.

    Raises:
        CheckpointError: a parameter has no source, one is missing, or a shape is wrong.
        SpecError: a parameter cannot be filled through views.
    """
    granularity = spec.granularity if spec else 1
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    grouped: dict[Any, list[tuple[int, str, torch.Tensor]]] = {}
    found: dict[int | None, dict[str, str]] = {}
    unknown_names = []
    for name, parameter in model.named_parameters():
        layer, inner = _split(name, layers)
        match = find_mapping(inner, in_layer=layer is not None)
        if match is None:
            unknown_names.append(name)
            continue
        row, local = match
        found.setdefault(layer, {})[row.role] = name
        expert, part = None, None
        if local is not None:
            expert = place.experts.rank * (made.num_experts or 0) // place.experts.size + local
            part = (expert % granularity, branch_of(expert // granularity))
        grouped.setdefault((row.role, layer, part), []).append((expert or 0, name, _plain(name, parameter)))
    _check_roles(unknown_names, found, made, layers)
    if model.post_process and not dense.tied_embeddings and "output" not in found.get(None, {}):
        raise CheckpointError(
            "output layer of the model",
            got="none",
            expected="output_layer.weight: the dense checkpoint has one of its own",
            fix="set share_embeddings_and_output_weights to False",
        )
    return [_target(key, sorted(members, key=_number), dense, made, place) for key, members in grouped.items()]


def _plain(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return what a parameter holds, which must be memory that can be filled through views.

    Raises:
        SpecError: it is Transformer Engine's FP8 (`fp8_param_gather`), a `DTensor` of FSDP, or the like.
    """
    if type(parameter) is not torch.nn.Parameter:
        raise SpecError(
            f"parameter {name}",
            got=type(parameter).__name__,
            expected="torch.nn.Parameter",
            fix="use fp8_param_gather=False (products may be in FP8 all the same), and no FSDP",
        )
    return parameter.data


def _number(member: tuple[int, str, torch.Tensor]) -> int:
    return member[0]


def _split(name: str, layers: list[int]) -> tuple[int | None, str]:
    """Return the layer's number in the whole model (None outside the layers) and the name inside it."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return None, name
    local, _, inner = name.removeprefix(prefix).partition(".")
    return layers[int(local)], inner


def _check_roles(
    unknown_names: list[str], found: dict[int | None, dict[str, str]], made: Architecture, layers: Iterable[int]
) -> None:
    """Check that the layers have the parameters that the upcycled model has: none without a source, none missing."""
    surplus, missing = list(unknown_names), []
    for layer in layers:
        wanted = {row.role for row in layer_mappings(made, layer)}
        got = found.get(layer, {})
        surplus += [name for role, name in got.items() if role not in wanted]
        missing += [f"{role} in layer {layer}" for role in sorted(wanted - got.keys())]
    for what, names in (("without a source", surplus), ("missing: dense tensors that nothing takes", missing)):
        if names:
            raise CheckpointError(
                f"model parameters {what}",
                got=", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else ""),
                expected="the dense checkpoint's layers, with experts where the spec puts them",
                fix="make the model's configuration (biases, shared experts, moe_layer_freq) and the spec agree",
            )


def _target(
    key: tuple[str, int | None, tuple[int, int] | None],
    members: list[tuple[int, str, torch.Tensor]],
    dense: Architecture,
    made: Architecture,
    place: RankCoords,
) -> ParamPlan:
    role, layer, part = key
    row = mapping_of(role, made)
    shard = place.expert if row.is_expert else place.dense
    names = tuple(name for _, name, _ in members)
    tensors = tuple(tensor for _, _, tensor in members)
    shape = tuple(tensors[0].shape)
    wanted = shard_shape(row, made, shard, padded_vocab=shape[0] * shard.size)
    too_few = row.sharding is Sharding.VOCABULARY and shape[0] * shard.size < made.vocab_size
    if shape != wanted or too_few:
        least = f"at least {made.vocab_size} rows over all ranks"
        raise CheckpointError(
            f"shape of {names[0]}",
            got=list(shape),
            expected=least if too_few else f"{list(wanted)}, from {hf_shape(row, 0, made)} over {shard.size} ranks",
            fix="vocabulary and layout must fit the dense checkpoint",
        )
    if role in ("router", "router_bias"):
        return ParamPlan(names, row, layer, tensors, (), None, (), None, shard)
    source = mapping_of("embedding" if role == "output" and dense.tied_embeddings else row.dense_role, dense)
    first_neuron = part[0] * (made.expert_ffn_size or 0) if part else 0
    made_of = source_slices(source, dense, shard, shape, first_neuron)
    experts = tuple(expert for expert, _, _ in members) if part else ()
    branch = part[1] if part else None
    return ParamPlan(names, row, layer, tensors, experts, source, made_of, branch, shard, first_neuron)


def filled_bytes(target: ParamPlan) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    """Yield the distinct slices, as name and bounds, that a target is made of."""
    yield from ((target.hf_name(piece.part), piece.source) for piece in target.pieces)
