"""GPTModel layers with a gated delta net in place of attention, as in Qwen3.5.

The net is a module of Megatron-Core 0.19 and later. This module needs flash-linear-attention.
Megatron's own function for layers with this net is not used, because that function needs Transformer Engine and has no
places for the norms and factors of `decoder_layers`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_upcycle.models.delta_nets import VARIANT, has_nets, net_layers


#: Names of the saved norm before attention: the name in Megatron's local layers, and the name in Transformer Engine.
_LOCAL_NORM, _SAVED_NORM = "input_layernorm.", "self_attention.in_proj.layer_norm_"


def without_nets(config: Any) -> Any:
    """Return a configuration whose layers all have attention, for Megatron's function that builds plain layers."""
    if not has_nets(config):
        return config
    plain = copy.copy(config)
    setattr(plain, VARIANT, None)
    return plain


def with_nets(config: Any, layers: Sequence[Any], vp_stage: int | None, backend: Any) -> list[Any]:
    """Replace attention by gated delta nets in the layers that the configuration names.

    Args:
        config: Megatron's `TransformerConfig`.
        layers: specs of a rank's layers, all with attention.
        vp_stage: number of the virtual pipeline stage.
        backend: Megatron's module provider, local or Transformer Engine's.

    Returns:
        The specs of all these layers, in the same order.
    """
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules

    in_proj = backend.column_parallel_layer_norm_linear()
    net = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=in_proj or backend.column_parallel_linear(),
            out_norm=backend.layer_norm(rms_norm=True),
            out_proj=backend.row_parallel_linear(),
        ),
    )
    pattern, numbers = net_layers(config), _numbers(config, len(layers), vp_stage)
    made = {id(spec): _with_net(spec, net, is_local=in_proj is None) for spec in layers}
    return [made[id(spec)] if pattern[number] else spec for number, spec in zip(numbers, layers, strict=True)]


def _numbers(config: Any, count: int, vp_stage: int | None) -> Sequence[int]:
    """Return the numbers of a rank's layers in the whole model, from 0."""
    if layout := config.pipeline_model_parallel_layout:
        numbers: Sequence[int] = layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
        return numbers
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return range(first, first + count)


def _with_net(spec: Any, net: ModuleSpec, *, is_local: bool) -> Any:
    spec = copy.copy(spec)
    spec.submodules = copy.copy(spec.submodules)
    spec.submodules.self_attention = net
    if is_local:  # like all other parameters, the norm is saved under Transformer Engine's name
        names = spec.submodules.sharded_state_dict_keys_map
        spec.submodules.sharded_state_dict_keys_map = names | {_LOCAL_NORM: _SAVED_NORM}
    return spec
