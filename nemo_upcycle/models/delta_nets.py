"""Megatron's settings for gated delta nets and gated attention, the layers of Qwen3.5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.architecture_parts import DeltaLayers
from nemo_upcycle.models.layer_settings import layers_with


#: Field of `DeltaLayers` -> setting, which has the same name in Megatron and in Hugging Face.
DELTA_SIZES = {
    "num_key_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "conv_size": "linear_conv_kernel_dim",
}
#: Megatron's setting for the kind of nets in a model; `None` for a model with attention in all layers.
VARIANT = "experimental_attention_variant"
_GATE, _LAYERS = "attention_output_gate", "linear_attention_freq"
_NETS, _NETS_SINCE_0_20 = "gated_delta_net", "gdn"


def gate_fields(arch: Architecture) -> dict[str, Any]:
    """Return Megatron's settings for gated attention and gated delta nets; empty if the model has neither.

    Args:
        arch: architecture of the model.
    """
    fields: dict[str, Any] = {_GATE: True} if arch.output_gate else {}
    if arch.delta:
        fields |= {VARIANT: _NETS, _LAYERS: [int(has_net) for has_net in arch.delta.pattern]}
        fields |= {setting: getattr(arch.delta, name) for name, setting in DELTA_SIZES.items()}
    return fields


def has_nets(config: Any) -> bool:
    """Return whether a configuration has gated delta nets in some layers."""
    return getattr(config, VARIANT, None) in (_NETS, _NETS_SINCE_0_20)


def net_layers(config: Any) -> tuple[bool, ...]:
    """Return which layers of a configuration have a gated delta net instead of attention."""
    return layers_with(config.linear_attention_freq, config.num_layers) if has_nets(config) else (False,)


def gates_of(config: Any) -> dict[str, Any]:
    """Read the `Architecture` fields for gated attention and gated delta nets from a configuration."""
    fields: dict[str, Any] = {"output_gate": bool(getattr(config, _GATE, False))}
    if has_nets(config):
        sizes = {name: getattr(config, setting) for name, setting in DELTA_SIZES.items()}
        fields["delta"] = DeltaLayers(pattern=net_layers(config), **sizes)
    return fields


def wrong_gates(config: Any, arch: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings to compare for gated attention and gated delta nets: name, got, expected.

    Args:
        config: configuration of a built model.
        arch: architecture that the model should have.
    """
    wanted = gate_fields(arch)
    yield _GATE, getattr(config, _GATE, False), wanted.get(_GATE, False)
    yield VARIANT, _NETS if has_nets(config) else getattr(config, VARIANT, None), wanted.get(VARIANT)
    if arch.delta and has_nets(config):
        yield _LAYERS, [int(has_net) for has_net in net_layers(config)], wanted[_LAYERS]
        yield from ((setting, getattr(config, setting), wanted[setting]) for setting in DELTA_SIZES.values())


def check_gates(config: Any, parent: Architecture) -> None:
    """Check that a configuration has the parent's settings for gated attention and gated delta nets.

    Args:
        config: Megatron's `TransformerConfig`.
        parent: architecture of the dense model.

    Raises:
        SpecError: a setting differs from the parent's.
    """
    for name, got, value in wrong_gates(config, parent):
        if got != value:
            expected, fix = f"{value}, as in the parent", "use the parent's own configuration"
            raise SpecError(field=f"model.config.{name}", got=got, expected=expected, fix=fix)
