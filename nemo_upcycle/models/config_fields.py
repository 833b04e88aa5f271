"""How each field of a model's configuration affects a model that is filled from a dense checkpoint.

One table, `config_fields.yaml`, serves every trainer. A field is `free` (has no effect on how the model is filled),
`handled` (changes how the model is filled, and this package takes care of the change), `inexact` (the filled model
differs from its parent, and the receipt says so) or `refused`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.mapping_table import ParamMapping, Sharding
from nemo_upcycle.utils.conf import read_yaml


#: Prefixes of the modules with the configuration classes that the table covers.
_TABLED = (
    *("megatron.core.", "megatron.training.models.", "megatron.bridge.models.hybrid."),
    *("megatron.bridge.models.gpt_provider", "megatron.bridge.models.transformer_config"),
    "nemo.collections.llm.gpt.model.base",
)
#: Kind of refused fields that change the function. Refused fields of other kinds change only parameters.
_FUNCTION = "changes the function"
#: Prefix of a role -> two settings. The first one interleaves the rows of gate and up. The second one selects the
#: modules that can read interleaved rows.
_INTERLEAVED = {
    "expert_": ("moe_mlp_glu_interleave_size", "moe_grouped_gemm"),
    "shared_": ("moe_shared_expert_glu_interleave_size", "use_grouped_gemm_for_shared_expert"),
}


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Return the table as meaning -> group -> fields. A group is a topic, a responsible function or a kind."""
    return dict(read_yaml(Path(__file__).with_suffix(".yaml")))


@functools.cache
def meanings() -> dict[str, str]:
    """Return the meaning of every field in the table."""
    return {name: meaning for meaning, kinds in table().items() for names in kinds.values() for name in names}


def refusals(
    get: Callable[[str], Any], *, experts: bool, parameters: bool = True
) -> Iterator[tuple[str, Any, str, str]]:
    """Yield the fields that have a refused value: name, value, accepted values and reason.

    Args:
        get: function that returns the value of a field; None if there is no such field.
        experts: whether the model has experts. In a dense model, the fields of experts do nothing.
        parameters: whether to include fields that change parameters but not the function.
    """
    for kind, fields in table()["refused"].items():
        for name, (*taken, because) in fields.items():
            if not (parameters or kind == _FUNCTION) or (name.startswith("moe_") and not experts):
                continue
            got = get(name)
            each = got if isinstance(got, list | tuple) else [got]
            if any(value not in (None, False, *taken) for value in each):
                yield name, got, " or ".join(map(str, taken)), because


def unknown_fields(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields that are missing in the table and do not have their default value: name, value and default.

    Args:
        config: a configuration, or its `run.Config`.
    """
    kind = getattr(config, "__fn_or_cls__", type(config))
    classes = [base for base in kind.__mro__ if base.__module__.startswith(_TABLED) and dataclasses.is_dataclass(base)]
    names = {field.name for base in classes for field in dataclasses.fields(base)} - meanings().keys()
    for field in dataclasses.fields(kind) if names else ():
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if field.name in names and (got := getattr(config, field.name, default)) != default:
            yield field.name, got, default


def check_fields(config: Any, *parts: Any) -> None:
    """Check that a model with this configuration can be filled and then computes its parent's function.

    Args:
        config: configuration of Megatron, NeMo or Bridge, built or as a `run.Config`.
        parts: modules of the built model. The modules' values take precedence over the configuration's values.

    Raises:
        SpecError: a field is refused or unknown, or needs another field.
    """

    def get(name: str) -> Any:
        return next((getattr(holder, name) for holder in (*parts, config) if hasattr(holder, name)), None)

    has_mamba = "M" in (get("hybrid_layer_pattern") or "")
    if has_mamba and (got := get("position_embedding_type")) != "none":
        expected = "none, because attention beside Mamba layers (M in hybrid_layer_pattern) has no positions"
        raise SpecError(field="model.config.position_embedding_type", got=got, expected=expected, fix="set it to none")
    for name, got, taken, because in refusals(get, experts=bool(get("num_moe_experts"))):
        if name == "position_embedding_type" and has_mamba:
            continue
        raise SpecError(
            field=f"model.config.{name}",
            got=got,
            expected=f"{taken} ({because})",
            fix=f"set it to {taken}, or omit it",
        )
    for name, got, default in unknown_fields(config):
        raise SpecError(
            field=f"model.config.{name}",
            kind="refused",
            got=f"is {got}",
            expected="this release of nemo-upcycle does not know its effect on the model",
            fix=f"leave it at its default, {default}",
        )
    for name, needed in _INTERLEAVED.values():
        if get(name) and not get(needed):
            raise SpecError(
                field=f"model.config.{name}",
                kind="refused",
                got=f"needs <model.config.{needed}>",
                expected="without it, modules read the gate and up rows in another order",
                fix="set both, or neither",
            )


def glu_interleave_size(config: Any, mapping: ParamMapping, name: str, rows: int) -> int | None:
    """Return the block size of a parameter with interleaved gate and up rows; None if the rows do not interleave.

    Megatron-Core 0.16 and later interleave the rows for kernels that fuse the activation. Each rank interleaves its
    own rows. Megatron-Bridge undoes the interleaving in checkpoints.

    Args:
        config: configuration of the model.
        mapping: mapping of the parameter.
        name: name of the parameter.
        rows: number of rows of this rank's shard.

    Raises:
        SpecError: the module cannot read interleaved rows, or the block size does not divide the shard.
    """
    setting, _ = _INTERLEAVED.get(mapping.role.removesuffix(mapping.dense_role), ("", ""))
    size = getattr(config, setting, None) if mapping.sharding is Sharding.GATED else None
    if not size:
        return None
    if ".local_experts." in name or rows % (2 * size):
        raise SpecError(
            field=f"model.config.{setting}",
            got=size,
            expected=f"a divisor of {rows // 2} neurons, in a TEGroupedMLP ({name})",
            fix="omit it",
        )
    return int(size)
