"""Checks of numbers from users (a bool is not a number), and of the fields of configurations."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import SpecError, UpcycleError


#: Larger token counts are mistakes.
_MOST_TOKENS = 1e18
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def is_whole(value: object, low: int, high: float = math.inf) -> bool:
    """Return whether a value is a whole number between two limits, both included."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, low: float, high: float = math.inf) -> bool:
    """Return whether a value is a number between two limits, both included; False for NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def check_whole(name: str, value: object, low: int, high: float = math.inf, of: str = "") -> None:
    """Check that a setting is a whole number within a range.

    Args:
        name: name of the setting.
        value: value of the setting.
        low: smallest allowed number.
        high: largest allowed number.
        of: setting that determines `high`, for the error.

    Raises:
        SpecError: the value is not a whole number, or is outside the range.

    Example:
        >>> check_whole("top_k", 9, 1, 8, "num_experts")
        Traceback (most recent call last):
        nemo_upcycle.errors.SpecError: top_k: got 9, expected a whole number, 1 to 8 (num_experts). Fix: ...
    """
    if not is_whole(value, low, high):
        limit = "or more" if high == math.inf else f"to {high}" + (f" (<{of}>)" if of else "")
        fix = f"set <{name}> within the range"
        raise SpecError(field=name, got=value, expected=f"a whole number, {low} {limit}", fix=fix)


def check_named(name: str, value: object) -> None:
    """Check that a name or a path is not empty, because an empty path means the current folder.

    Args:
        name: name of the setting.
        value: value of the setting; None is not checked.

    Raises:
        SpecError: the value is empty.
    """
    if value is not None and not str(value).strip():
        raise SpecError(field=name, kind="missing", got="is empty", fix=f"give <{name}> a name or a path")


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Check that a setting is a finite number within a range.

    Args:
        name: name of the setting.
        value: value of the setting.
        low: smallest allowed number.
        high: largest allowed number.

    Raises:
        SpecError: the value is not a finite number, or is outside the range.
    """
    if not is_number(value, low, high) or value == math.inf:
        limit = "or more" if high == math.inf else f"to {high:g}"
        fix = f"set <{name}> within the range"
        raise SpecError(field=name, got=value, expected=f"a number, {low:g} {limit}", fix=fix)


def check_capacity(factor: float | None, pad: bool, num_experts: int, top_k: int) -> None:
    """Check the experts' capacity (`moe_expert_capacity_factor`, `moe_pad_expert_input_to_capacity`).

    Args:
        factor: token slots of an expert, relative to a balanced load; None drops no tokens.
        pad: whether every expert's input is padded to its capacity.
        num_experts: experts per layer.
        top_k: experts per token.

    Raises:
        SpecError: an expert would have more slots than there are tokens (Megatron-Core then fails in the first step),
            or padding would make every expert compute every token, or there is no capacity to pad to.
    """
    most = num_experts / top_k
    problems = (
        (
            factor is None and pad,
            "a number, because experts are padded to their capacity",
            "set <capacity_factor>=1, or do not pad",
        ),
        (
            factor is not None and not factor <= most,  # also true for NaN
            f"at most num_experts / top_k ({most:g}), which already drops nothing",
            f"set <capacity_factor>={most:g}",
        ),
        (
            factor == most and pad,
            f"less than {most:g} with padding, because otherwise every expert would compute every token",
            "lower it, or do not pad",
        ),
    )
    got = None if factor is None else f"{factor:g}"
    for holds, expected, fix in problems:
        if holds:
            raise SpecError(field="capacity_factor", got=got, expected=expected, fix=fix)


def require_local(name: str, path: str) -> str:
    """Check that a path is not an address, and return the path.

    `Path` turns an address such as `s3://...` into a folder `s3:`.

    Args:
        name: name of the argument.
        path: value of the argument.

    Raises:
        UpcycleError: the path is an address.
    """
    if "://" in path:
        raise UpcycleError(
            name,
            kind="refused",
            got=f"is {path}, not a path on this machine",
            fix="copy it here, or mount the storage so that all nodes see it",
        )
    return path


def number_of_tokens(text: str) -> float:
    """Parse a number of tokens, for example `100B`, `1.5T`, `27e9` or `27,000,000,000`.

    Raises:
        SpecError: the text is not a valid number of tokens; the error names `--tokens`.
    """
    unit = _UNITS.get(text[-1:].upper())
    number = text[:-1] if unit else text
    if re.fullmatch(r"\d{1,3}(,\d{3})+", number):
        number = number.replace(",", "")
    try:
        value = float(number) * (unit or 1)
    except ValueError:
        value = 0.0
    if not 1 <= value <= _MOST_TOKENS:
        expected = f"a number: 100B, 1.5T, 500M or 1e11, at most {_MOST_TOKENS:g}"
        raise SpecError("--tokens", got=repr(text), expected=expected, fix="set --tokens 100B")
    return value


def valid(expected: str, holds: Callable[[Any], object]) -> dict[str, Any]:
    """Return field metadata for `check_fields` that describes the valid values; None is always valid.

    Args:
        expected: description of valid values, for errors.
        holds: function that returns whether a value is valid.
    """
    return {"expected": expected, "holds": holds}


def one_of(choices: Collection[str]) -> dict[str, Any]:
    """Return field metadata for `check_fields` that allows one of the names in `choices`, or a list of them."""
    return {"choices": choices}


def check_fields(where: str, config: Any, explained: Path, prefix: str = "") -> None:
    """Check the values of a configuration's fields, including nested configurations.

    Args:
        where: the file, for errors.
        config: instance of a dataclass whose fields have metadata of `valid` or `one_of`.
        explained: file that explains the fields.
        prefix: key of a nested configuration in the file, followed by a dot.

    Raises:
        UpcycleError: a value is invalid, or is not an allowed name.
    """
    for field in dataclasses.fields(config):
        key, value, about = prefix + field.name, getattr(config, field.name), field.metadata
        inner = {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
        for name, one in inner.items():
            if dataclasses.is_dataclass(one):
                check_fields(where, one, explained, f"{name}.")
        if value is None:
            continue
        for name in value if isinstance(value, list) else [value]:
            if name not in about.get("choices", [name]):
                raise UpcycleError.unknown(f"{where}: {key}", name, about["choices"])
        if "holds" in about and not about["holds"](value):
            is_settable = field.default not in (None, dataclasses.MISSING)
            fix = f"set {key}={field.default}" if is_settable else f"see {explained}"
            got = "none" if value in ([], {}) else value
            raise UpcycleError(f"{where}: {key}", got=got, expected=about["expected"], fix=fix)
