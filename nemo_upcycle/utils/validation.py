"""Checks of numbers that a user gave, a bool is none, and of the fields of configurations."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import SpecError, UpcycleError


#: Larger numbers of tokens are mistakes.
_MOST_TOKENS = 1e18
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def is_whole(value: object, low: int, high: float = math.inf) -> bool:
    """Return whether a value is a whole number between two others, both included."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, low: float, high: float = math.inf) -> bool:
    """Return whether a value is a number between two others, both included; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def check_whole(name: str, value: object, low: int, high: float = math.inf, of: str = "") -> None:
    """Check that a setting is a whole number within a range.

    Args:
        name: the setting's.
        value: its value.
        low: the smallest number allowed.
        high: the largest.
        of: the setting that the largest comes from, for the text of the error.

    Raises:
        SpecError: it is not.

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
    """Check that a name or a path is not empty, which would mean the current folder.

    Args:
        name: the setting's.
        value: its value; None is not checked.

    Raises:
        SpecError: it is empty.
    """
    if value is not None and not str(value).strip():
        raise SpecError(field=name, kind="missing", got="is empty", fix=f"give <{name}> a name or a path")


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Check that a setting is a finite number within a range.

    Args:
        name: the setting's.
        value: its value.
        low: the smallest number allowed.
        high: the largest.

    Raises:
        SpecError: it is not.
    """
    if not is_number(value, low, high) or value == math.inf:
        limit = "or more" if high == math.inf else f"to {high:g}"
        fix = f"set <{name}> within the range"
        raise SpecError(field=name, got=value, expected=f"a number, {low:g} {limit}", fix=fix)


def check_capacity(factor: float | None, pad: bool, num_experts: int, top_k: int) -> None:
    """Check the capacity of experts: `moe_expert_capacity_factor`, `moe_pad_expert_input_to_capacity`.

    Args:
        factor: token slots of an expert over those of perfect balance; None drops nothing.
        pad: whether every expert computes its whole capacity.
        num_experts: experts of a layer.
        top_k: experts of a token.

    Raises:
        SpecError: an expert would have more slots than there are tokens (Megatron-Core then fails in the first step),
            or padding would let every expert compute every token, or there is no capacity to pad to.
    """
    most = num_experts / top_k
    problems = (
        (
            factor is None and pad,
            "a number, because experts are padded to their capacity",
            "set <capacity_factor>=1, or do not pad",
        ),
        (
            factor is not None and not factor <= most,  # nor NaN
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
    """Return the name of a folder or file, and check that it is no address: `Path` makes a folder `s3:` of one.

    Args:
        name: the argument's name.
        path: its value.

    Raises:
        UpcycleError: it is an address.
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
    """Return the number that a text such as `100B`, `1.5T`, `27e9` or `27,000,000,000` stands for.

    Raises:
        SpecError: it stands for none; names `--tokens`.
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
    """Describe the values of a configuration's field, as metadata for `check_fields`; None is always valid.

    Args:
        expected: what a value has to be, for errors.
        holds: whether a value is that.
    """
    return {"expected": expected, "holds": holds}


def one_of(choices: Collection[str]) -> dict[str, Any]:
    """Describe a field that takes one of some names, or a list of them, as metadata for `check_fields`."""
    return {"choices": choices}


def check_fields(where: str, config: Any, explained: Path, prefix: str = "") -> None:
    """Check the values of a configuration's fields, and of those in its fields.

    Args:
        where: the file, for errors.
        config: an instance of a dataclass, whose fields have metadata of `valid` or `one_of`.
        explained: the file that explains the fields.
        prefix: the key of the configuration in the file, with a dot behind it.

    Raises:
        UpcycleError: a value does not hold, or is none of the names.
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
