"""Bridges for the families whose classes Megatron-Bridge lacks, generated from the families and the mapping table.

Once this module is imported, `AutoBridge` imports and exports `MixtralForCausalLM`, `Qwen2MoeForCausalLM`, and other
classes that Bridge does not know, if their families were registered before the import. Bridge's own bridges of MoE
classes then export upcycled models, too. They add the tensors that the class has and the upcycled model lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, MegatronModelBridge, get_model_bridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import Family, MoeFamily, find_family, parents, targets
from nemo_upcycle.models.families.base import FOLDED, WITHOUT_EFFECT, ZERO_FILLED
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.models.mapping import constant_tensors, hf_constants
from nemo_upcycle.models.mapping_table import DELTA_MAPPINGS, MAPPINGS, Sharding
from nemo_upcycle.models.stacked import is_stacked
from nemo_upcycle.trainers.bridge.models import provider_fields


class FusedGatedMapping(MegatronParamMapping[torch.Tensor]):
    """Maps gate and up projection that the folder has as one tensor, gate rows first; see `GatedMLPMapping`."""

    def __init__(self, megatron_param: str, hf_param: str) -> None:
        super().__init__(megatron_param, hf_param)
        self._apart = GatedMLPMapping(megatron_param, gate=f"{hf_param}.gate", up=f"{hf_param}.up")

    def hf_to_megatron(self, hf_weights: torch.Tensor, megatron_module: Any) -> torch.Tensor:
        """Return this rank's shard."""
        return self._apart.hf_to_megatron(dict(zip(("gate", "up"), hf_weights.chunk(2), strict=True)), megatron_module)

    def megatron_to_hf(self, megatron_weights: torch.Tensor | None, megatron_module: Any) -> dict[str, torch.Tensor]:
        """Return the tensor under its name; for experts, return the tensors of all ranks."""
        parts = self._apart.megatron_to_hf(megatron_weights, megatron_module)
        names = [name.removesuffix(".gate") for name in parts if name.endswith(".gate")]
        return {name: torch.cat((parts[f"{name}.gate"], parts[f"{name}.up"])) for name in names}


#: Bridge's mapping for each kind of parameter; `AutoMapping` asks the module how it is sharded.
_KINDS = {Sharding.QKV: QKVMapping, Sharding.GATED: GatedMLPMapping, Sharding.REPLICATED: ReplicatedMapping}
_FUSED = {Sharding.QKV: ConcatenatedQKVMapping, Sharding.GATED: FusedGatedMapping}


#: Matches the name of a tensor in a layer, up to and including the layer's number.
_LAYER = re.compile(r".*?layers\.\d+\.")


class UpcycledExport(MegatronModelBridge):
    """Exports upcycled models of a family, and adds the tensors that only the class has; see `MoeFamily.constants`."""

    family: Family

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return Bridge's mappings of the class, and the table's mappings for modules that Bridge leaves out."""
        return MegatronMappingRegistry(*super().mapping_registry(), *_mappings(self.family))

    def stream_weights_megatron_to_hf(
        self,
        megatron_model: Any,
        hf_pretrained: Any,
        cpu: bool = True,
        show_progress: bool = True,
        conversion_tasks: list[Any] | None = None,
        merge_adapter_weights: bool = True,
        weight_dtype: torch.dtype | None = None,
    ) -> Iterator[HFWeightTuple]:
        """Yield the tensors of a Hugging Face folder, with the class's constants among the tensors of their layers."""
        models = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        if conversion_tasks is None:
            conversion_tasks = self.build_conversion_tasks(hf_pretrained, unwrap_model(models), weight_dtype)
            weight_dtype = None  # the tasks already contain this type
        weights = super().stream_weights_megatron_to_hf(
            models, hf_pretrained, cpu, show_progress, conversion_tasks, merge_adapter_weights, weight_dtype
        )
        config = getattr(hf_pretrained, "config", hf_pretrained).to_dict()
        scale = getattr(unwrap_model(models)[0].config, "moe_router_topk_scaling_factor", None) or 1.0
        require_unfolded(self.family.hf_class, config, scale)
        try:
            arch = architecture_from_config(config)
        except CheckpointError:  # a model of Bridge's own class, with features that no upcycled model has
            yield from weights
            return
        made = {name for task in conversion_tasks if task for name in _hf_names(task.mapping)}
        absent = [name for name in hf_constants(arch) if name not in made]
        factors = _factors(self.family, arch) if self._lacks_gate(absent) else {}
        constants: dict[str, torch.Tensor] = {}
        embedding = None
        for name, weight in weights:
            constants = constants or constant_tensors(arch, weight.dtype)
            made.add(name)
            if name in self.family.names["embedding"]:
                embedding = weight
            yield HFWeightTuple(name, weight * factors[name] if name in factors else weight)
            layer = _LAYER.match(name)
            for other in [other for other in absent if layer and other.startswith(layer[0])]:
                absent.remove(other)
                yield HFWeightTuple(other, constants[other].to(weight.device).contiguous())
        (output,) = self.family.names["output"]
        if output not in made and embedding is not None and not arch.tied_embeddings:
            yield HFWeightTuple(output, embedding.clone())  # a builder's model shares the tensor

    def _lacks_gate(self, absent: list[str]) -> bool:
        """Return whether a factor makes up for a missing gate; always true if the class has no gate."""
        gates = self.family.names.get("shared_gate", ())
        return not gates or any(name.endswith(gate.rpartition("}")[2]) for name in absent for gate in gates)


def _hf_names(mapping: Any) -> list[str]:
    """Return the names of the Hugging Face tensors in one of Bridge's mappings."""
    return [mapping.hf_param] if isinstance(mapping.hf_param, str) else list(mapping.hf_param.values())


def require_unfolded(hf_class: str, config: dict[str, Any], scale: float) -> None:
    """Check that no setting of a model is folded into the weights of its folder, because Bridge changes no weights.

    Args:
        hf_class: name of the folder's class.
        config: the folder's `config.json`.
        scale: `routed_scaling_factor` of the model.

    Raises:
        CheckpointError: the class lacks a setting of the model.
    """
    family = find_family(hf_class)
    folded = {name: config[FOLDED + name] for name in WITHOUT_EFFECT if FOLDED + name in config}
    if isinstance(family, MoeFamily) and scale != 1 and "routed_scaling_factor" not in family.defaults:
        folded["routed_scaling_factor"] = scale
    if folded:
        settings = ", ".join(f"{name}={value}" for name, value in folded.items())
        raise CheckpointError(
            "Megatron-Bridge",
            kind="refused",
            got=f"cannot export this {hf_class}: the class has no setting for {settings}",
            fix="use `nemo-upcycle export`, which folds such settings into the weights",
        )


def _factors(family: Family, arch: Architecture) -> dict[str, float]:
    """Return the factors on Megatron parameters that are not 1, by the names of the Hugging Face tensors."""
    return {
        name.format(layer=layer): factor
        for role, factor in family.hf_factors.items()
        for name in family.names[role]
        for layer in range(arch.num_layers)
    }


class FamilyBridge(UpcycledExport):
    """Bridge of a family, in the form that `AutoBridge` finds.

    The Megatron model has every tensor that the class requires. If the upcycled model lacks such a tensor, the
    Megatron model has the zeros that the folder contains for this tensor.

    Example:
        >>> AutoBridge.from_hf_pretrained("runs/demo/hf").to_megatron_provider()  # doctest: +SKIP
    """

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """Return the provider of a model of the family."""
        provider: GPTModelProvider = super().provider_bridge(hf_pretrained)
        config = hf_pretrained.config.to_dict()
        config.pop(ZERO_FILLED, None)
        fields = provider_fields(architecture_from_config(config))
        fields["moe_shared_expert_gate"] = "shared_gate" in self.family.names
        for name, value in fields.items():
            setattr(provider, name, value)
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the mappings of all tensors, for Transformer Engine's modules and for the local modules."""
        return MegatronMappingRegistry(*_mappings(self.family))


def _mappings(family: Family) -> Iterator[Any]:
    for mapping in MAPPINGS:
        if mapping in DELTA_MAPPINGS:  # Bridge's own classes have these mappings
            continue
        names = family.names.get(mapping.role, ())
        theirs = [name.format(layer="*", expert="*") for name in dict.fromkeys(names)]
        kind = (_FUSED if len(theirs) < len(names) else _KINDS).get(mapping.sharding, AutoMapping)
        for name in mapping.megatron if theirs else ():
            yield kind(("decoder.layers.*." if mapping.in_layer else "") + name.format(expert="*"), *theirs)


def _register(family: Family) -> None:
    source = getattr(transformers, family.hf_class, family.hf_class)
    register = MegatronModelBridge.register_bridge(source=source, target=GPTModel, model_type=family.model_type)
    known = family.hf_class in AutoBridge.list_supported_models()
    bases = (UpcycledExport, type(get_model_bridge(source))) if known else (FamilyBridge,)
    register(type(f"{family.hf_class}Bridge", bases, {"family": family}))


for _family in (*parents(), *targets()):
    # Bridge's mappings support no factor. In Qwen2-MoE a factor replaces the gate, but Bridge's model has the
    # gate itself, so no factor is lost.
    _loses_factor = _family.hf_factors and "shared_gate" not in _family.names
    _is_known = _family.hf_class in AutoBridge.list_supported_models()
    if any(is_stacked(_name) for _names in _family.names.values() for _name in _names):
        continue  # Bridge's mappings do not support one tensor for all experts
    if isinstance(_family, MoeFamily) if _is_known else not _loses_factor:
        _register(_family)
