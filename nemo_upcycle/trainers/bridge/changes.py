"""List the differences between two Bridge configurations, as overrides for Bridge's command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from megatron.bridge.utils.activation_map import callable_to_str


def changed_settings(before: Any, after: Any) -> list[str]:
    """List the settings that differ between two configurations, as `KEY=VALUE` for Bridge's command line.

    Functions and classes are omitted, because no command line can set them. The activation function is listed.

    Args:
        before: configuration to compare with.
        after: configuration whose values are listed.

    Example:
        >>> changed_settings(config, upcycled(config, "/models/mine", UpcycleSpec()))[0]  # doctest: +SKIP
        'train.train_iters=23842'
    """
    old, new = (dict(_settings(config)) for config in (before, after))
    return [f"{name}={word(value)}" for name, value in new.items() if name not in old or old[name] != value]


def _settings(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(part):
        value = getattr(part, field.name, None)
        if field.name.startswith("_") or field.name.endswith("_wrap_hooks") or isinstance(value, type):
            continue
        name = f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from _settings(value, f"{name}.")
        elif field.name == "activation_func":
            yield name, callable_to_str(value)
        elif not callable(value):
            yield name, list(value) if isinstance(value, tuple) else value  # overrides have only lists


def word(value: Any) -> str:
    """Return a value in Hydra's grammar of overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{word(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(word, value)) + "]"
    if isinstance(value, int | float | torch.dtype):
        return str(value)
    if re.fullmatch(r"[\w./:+-]+", str(value)):
        return str(value)
    quoted = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{quoted}'"
