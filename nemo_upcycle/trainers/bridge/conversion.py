"""Bridges of the families whose classes Megatron-Bridge lacks, generated from them and from the mapping table.

Import this module, then `AutoBridge` imports and exports `MixtralForCausalLM`, `Qwen2MoeForCausalLM` and the class of
every other family that was registered before and that Bridge does not know itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_upcycle.models.families import Family, parents, targets
from nemo_upcycle.models.families.base import ZERO_FILLED
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.models.mapping import MAPPINGS, Sharding
from nemo_upcycle.trainers.bridge.models import provider_of


class FusedGatedMapping(MegatronParamMapping[torch.Tensor]):
    """Gate and up projection that the folder has in one tensor, gate rows above up rows; see `GatedMLPMapping`."""

    def __init__(self, megatron_param: str, hf_param: str) -> None:
        super().__init__(megatron_param, hf_param)
        self._apart = GatedMLPMapping(megatron_param, gate=f"{hf_param}.gate", up=f"{hf_param}.up")

    def hf_to_megatron(self, hf_weights: torch.Tensor, megatron_module: Any) -> torch.Tensor:
        """Return this rank's shard."""
        return self._apart.hf_to_megatron(dict(zip(("gate", "up"), hf_weights.chunk(2), strict=True)), megatron_module)

    def megatron_to_hf(self, megatron_weights: torch.Tensor | None, megatron_module: Any) -> dict[str, torch.Tensor]:
        """Return the tensor by its name; of experts, those of all ranks."""
        parts = self._apart.megatron_to_hf(megatron_weights, megatron_module)
        names = [name.removesuffix(".gate") for name in parts if name.endswith(".gate")]
        return {name: torch.cat((parts[f"{name}.gate"], parts[f"{name}.up"])) for name in names}


#: Bridge's mapping of each kind of parameter; `AutoMapping` asks the module how it is cut.
_KINDS = {Sharding.QKV: QKVMapping, Sharding.GATED: GatedMLPMapping, Sharding.REPLICATED: ReplicatedMapping}
_FUSED = {Sharding.QKV: ConcatenatedQKVMapping, Sharding.GATED: FusedGatedMapping}


class FamilyBridge(MegatronModelBridge):
    """Bridge of a family, as `AutoBridge` finds it.

    What the class always has, the Megatron model has, too: the folder's zeros where the upcycled model has none.

    Example:
        >>> AutoBridge.from_hf_pretrained("runs/demo/hf").to_megatron_provider()  # doctest: +SKIP
    """

    family: Family

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """Return the provider of a model of the family."""
        config = hf_pretrained.config.to_dict()
        config.pop(ZERO_FILLED, None)
        gate = {"moe_shared_expert_gate": True} if "shared_gate" in self.family.names else {}
        return provider_of(architecture_from_config(config), **gate)

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return which tensor is made of which, with Transformer Engine's modules and with the local ones."""
        return MegatronMappingRegistry(*_mappings(self.family))


def _mappings(family: Family) -> Iterator[Any]:
    for mapping in MAPPINGS:
        names = family.names.get(mapping.role, ())
        theirs = [name.format(layer="*", expert="*") for name in dict.fromkeys(names)]
        kind = (_FUSED if len(theirs) < len(names) else _KINDS).get(mapping.sharding, AutoMapping)
        for name in mapping.megatron if theirs else ():
            yield kind(("decoder.layers.*." if mapping.in_layer else "") + name.format(expert="*"), *theirs)


def _register(family: Family) -> None:
    register = MegatronModelBridge.register_bridge(
        source=getattr(transformers, family.hf_class, family.hf_class), target=GPTModel, model_type=family.model_type
    )
    register(type(f"{family.hf_class}Bridge", (FamilyBridge,), {"family": family}))


for _family in (*parents(), *targets()):
    # Bridge's mappings know no factor. Qwen2-MoE's makes up for the gate, which Bridge's model has itself.
    _loses_factor = _family.hf_factors and "shared_gate" not in _family.names
    if _family.hf_class not in AutoBridge.list_supported_models() and not _loses_factor:
        _register(_family)
