"""Plan which dense slices fill which local parameters, and check the plan as a whole.

Nothing is read or written here, so a plan can be made for any rank of any cluster on the meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.config_fields import glu_interleave_size
from nemo_upcycle.models.hybrid import LayerPart, layer_parts
from nemo_upcycle.models.mapping import find_mapping, mapping_of, part_mappings
from nemo_upcycle.models.mapping_table import ParamMapping, Sharding
from nemo_upcycle.models.sharding import Shard, hf_shape, shard_shape
from nemo_upcycle.online.quantized import is_quantized, values_to_fill
from nemo_upcycle.online.receipt import ParameterRecord
from nemo_upcycle.online.tensor_plan import ModelPlan, TensorPlan
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.dtypes import dtype_name


@dataclass(frozen=True)
class RankCoords:
    """A rank's coordinates in the groups that cut dense tensors, cut expert tensors, and distribute experts."""

    dense: Shard
    expert: Shard
    experts: Shard

    @staticmethod
    def here() -> RankCoords:
        """Return this rank's coordinates from Megatron's groups."""
        from megatron.core import parallel_state as ps

        return RankCoords(
            Shard(ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()),
            Shard(ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()),
            Shard(ps.get_expert_model_parallel_rank(), ps.get_expert_model_parallel_world_size()),
        )


@dataclass(frozen=True)
class ParamPlan:
    """The plan of one local parameter. Local experts that share a dense slice have one plan for each matrix.

    Args:
        names: names of the parameters.
        tensors: data of the parameters; for quantized parameters, the values to quantize.
        experts: expert numbers over all ranks; empty if the parameters do not belong to routed experts.
        made_of: how each of the tensors is made.
        quantized: parameters that the tensors are quantized into; empty if the tensors are the parameters' own data.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    experts: tuple[int, ...]
    made_of: TensorPlan
    quantized: tuple[torch.Tensor, ...] = ()

    def records(self, spec: UpcycleSpec | None) -> list[ParameterRecord]:
        """Return one record for each parameter, which says how the parameter is made."""
        branch = f"{self.made_of.branch}:" if self.made_of.branch else ""
        sources = tuple(f"{branch}{slice_}" for slice_ in self.made_of.slices)
        shape = tuple(self.tensors[0].shape)
        dtype = type(self.quantized[0]).__name__ if self.quantized else dtype_name(self.tensors[0].dtype)
        made_by = self.made_of.made_by(spec)
        return [ParameterRecord(name, shape, dtype, made_by, sources) for name in self.names]


def param_plans(model: Any, plan: ModelPlan, coords: RankCoords) -> list[ParamPlan]:
    """Plan how to fill every parameter of one model chunk exactly once.

    Args:
        model: Megatron's `GPTModel` or `HybridModel`, which may be on the meta device.
        plan: plan of the whole model.
        coords: coordinates of the rank.

    Raises:
        CheckpointError: a parameter has no source, a parameter is missing, or a shape is wrong.
        SpecError: a parameter cannot be filled through views.
    """
    parts, moe_arch = layer_parts(model), plan.moe_arch
    layers = [part.layer for part in parts]
    found: dict[int | None, dict[str, str]] = {}
    mapped, unknown_names = [], []
    for name, parameter in (*model.named_parameters(), *(_biases(model) if moe_arch.balancing_bias else ())):
        layer, inner = split_name(name, layers)
        if match := find_mapping(inner, in_layer=layer is not None):
            found.setdefault(layer, {})[match[0].role] = name
            mapped.append((name, parameter, layer, *match))
        else:
            unknown_names.append(name)
    _check_roles(unknown_names, found, moe_arch, parts)
    if model.post_process and not plan.dense.tied_embeddings and "output" not in found.get(None, {}):
        raise CheckpointError(
            "The model",
            kind="state",
            got="has no output_layer.weight, but the parent has one",
            fix="set share_embeddings_and_output_weights to False",
        )
    return _group_plans(mapped, model.config, plan, coords)


def _group_plans(
    mapped: Iterable[tuple[str, torch.Tensor, int | None, ParamMapping, int | None]],
    config: Any,
    plan: ModelPlan,
    coords: RankCoords,
) -> list[ParamPlan]:
    """Plan parameters by their role. Experts that are made of the same slices share one plan.

    Args:
        mapped: tuples of parameter name, parameter, layer, row of the mapping table, and local expert.
        config: configuration of the model.
        plan: plan of the whole model.
        coords: coordinates of the rank.

    Raises:
        CheckpointError: a shape is wrong.
        SpecError: a parameter cannot be filled through views.
    """
    if plan.moe_arch.wide_qk_norm and coords.dense.size > (groups := plan.moe_arch.num_kv_heads):
        raise SpecError(
            field="tensor_model_parallel_size",
            got=coords.dense.size,
            expected=(f"at most {groups}, the number of key-value heads, because query and key norms cover all heads"),
            fix="lower it",
        )
    grouped: dict[TensorPlan, list[tuple[int, str, torch.Tensor, torch.Tensor]]] = {}
    moe_arch = plan.moe_arch
    first_expert = coords.experts.rank * (moe_arch.num_experts or 0) // coords.experts.size
    for name, parameter, layer, megatron_mapping, local_expert in mapped:
        mapping = mapping_of(megatron_mapping.role, moe_arch)
        shard = coords.expert if mapping.is_expert else coords.dense
        expert = 0 if local_expert is None else first_expert + local_expert
        tensor = _tensor_to_fill(name, parameter)
        shape = _checked_shape(name, tensor, mapping, moe_arch, shard)
        interleaved = glu_interleave_size(config, mapping, name, shape[0])
        made_of = plan.tensor(mapping, layer, expert, shard=shard, shape=shape, interleaved=interleaved)
        grouped.setdefault(made_of, []).append((expert, name, parameter, tensor))
    plans = []
    for made_of, members in grouped.items():
        experts, names, parameters, tensors = zip(*sorted(members, key=lambda member: member[0]), strict=True)
        quantized = tuple(filter(is_quantized, parameters))
        plans.append(ParamPlan(names, tensors, experts if made_of.mapping.is_expert else (), made_of, quantized))
    return plans


def _checked_shape(
    name: str, tensor: torch.Tensor, mapping: ParamMapping, moe_arch: Architecture, shard: Shard
) -> tuple[int, ...]:
    """Return the shape of a parameter after checking that the dense checkpoint can fill it.

    Raises:
        CheckpointError: the dense checkpoint cannot fill the parameter.
    """
    shape = tuple(tensor.shape)
    rows = shape[0] * shard.size
    wanted = shard_shape(mapping, moe_arch, shard, padded_vocab=rows)
    expected = f"{list(wanted)}, from {hf_shape(mapping, 0, moe_arch)} over {shard.size} ranks"
    too_few = mapping.sharding is Sharding.VOCABULARY and rows < moe_arch.vocab_size
    if too_few:
        expected = f"at least {moe_arch.vocab_size} rows over all ranks"
    if shape != wanted or too_few:
        fix = "choose a vocabulary size and a layout that give the model at least these rows"
        raise CheckpointError(f"shape of {name}", got=list(shape), expected=expected, fix=fix)
    return shape


def _biases(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the router buffers that bias the choice of experts, and protect these buffers from later casts."""
    for name, module in model.named_modules():
        if name.endswith(".mlp.router") and (bias := getattr(module, "expert_bias", None)) is not None:
            bias.data = bias.data.float()
            vars(module)["_apply"] = functools.partial(_apply_but_to_bias, module)
            yield f"{name}.expert_bias", bias


def _apply_but_to_bias(router: Any, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Move or cast a router as `Module._apply` does. Its bias is only moved, never cast."""
    kept = router.expert_bias
    made = torch.nn.Module._apply(router, change, recurse)
    router.expert_bias = kept.to(router.expert_bias.device)
    return made


def _tensor_to_fill(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return the tensor to fill: the parameter's own memory, or the values to quantize into the parameter.

    Raises:
        SpecError: the parameter has another class, such as FSDP's `DTensor`.
    """
    if is_quantized(parameter):
        return values_to_fill(parameter)
    if type(parameter) is not torch.nn.Parameter and not name.endswith(".expert_bias"):
        raise SpecError(
            f"Parameter {name}",
            kind="state",
            got=(
                f"is a {type(parameter).__name__}; only a torch.nn.Parameter, or an FP8 or FP4 parameter of "
                "Transformer Engine, can be filled"
            ),
            fix="turn FSDP off, and give each expert its own parameter",
        )
    return parameter.data


def split_name(name: str, layers: list[int]) -> tuple[int | None, str]:
    """Return the layer number in the whole model (None outside the layers) and the name inside the layer."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return None, name
    local, _, inner = name.removeprefix(prefix).partition(".")
    return layers[int(local)], inner


def _check_roles(
    unknown_names: list[str],
    found: dict[int | None, dict[str, str]],
    moe_arch: Architecture,
    parts: Iterable[LayerPart],
) -> None:
    """Check that every parameter of the layers has a source, and that the layers lack no parameter."""
    surplus, missing = list(unknown_names), []
    wanted_roles: dict[int, set[str]] = {}  # a stage may end between a layer's attention and its network
    for part in parts:
        roles = {mapping.role for mapping in part_mappings(moe_arch, part)}
        wanted_roles[part.layer] = wanted_roles.get(part.layer, set()) | roles
    for layer, wanted in wanted_roles.items():
        got = found.get(layer, {})
        surplus += [name for role, name in got.items() if role not in wanted]
        missing += [f"{role} in layer {layer}" for role in sorted(wanted - got.keys())]
    for what, names in (("Model parameters have no source", surplus), ("The model lacks parameters", missing)):
        if names:
            raise CheckpointError(
                f"{what}:",
                kind="state",
                got=", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else ""),
                fix="make the spec agree with the model's configuration (biases, shared experts, moe_layer_freq)",
            )
