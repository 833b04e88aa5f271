"""Write out the references in files of OmegaConf, within bounds.

Only files of executors may compute values, as `${oc.env:HOME}` does: the others are copied into what is published.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.masking import masked_text


#: Characters of a file with aliases and references written out, how deep its values may lie in each other, and the
#: characters that are added for each value. OmegaConf takes some 10 s for so much.
MAX_CHARACTERS, MAX_DEPTH, VALUE_CHARACTERS = 2**20, 50, 20
#: A reference of OmegaConf's: the dots of a relative one, and the key, which a resolver may stand before.
_REFERENCE = re.compile(r"\$\{(?:[\w.]+:)?[\s\"']*(\.*)([^{}:,\"']*)")
#: A value that OmegaConf computes: of the environment, as `${oc.env:HOME}` is, or of anything else.
_COMPUTED = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^{}]*?:")
#: Backslashes and what begins a reference.
_REFERS = re.compile(r"(\\*)(\$\{)")


def escaped(content: Any) -> Any:
    """Return values in which OmegaConf finds no reference."""
    if isinstance(content, dict):
        return {key: escaped(value) for key, value in content.items()}
    if isinstance(content, list):
        return [escaped(value) for value in content]
    return _REFERS.sub(r"\1\1\\\2", content) if isinstance(content, str) else content


def resolved(config: Any, where: str, *, computes: bool = False) -> Any:
    """Return a configuration of OmegaConf's as plain values, with its references written out if that stays small.

    Args:
        config: the configuration.
        where: where it stands, for errors.
        computes: whether it may read the environment.
    """
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(config)
    sizes: dict[tuple[str, ...], int] = {}

    def size_of(value: Any, at: tuple[str, ...], depth: int) -> int:
        if at in sizes:
            return sizes[at]
        sizes[at] = 0  # of one that refers to itself, which OmegaConf refuses
        if isinstance(value, dict | list):
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            size = VALUE_CHARACTERS + sum(size_of(one, (*at, str(key)), depth) for key, one in entries)
        else:
            size = VALUE_CHARACTERS + len(str(value))
            if not computes and isinstance(value, str) and _COMPUTED.search(value):
                expected = "a value: only the file of an executor reads the environment, or computes one"
                key = f"{where}: {'.'.join(at)}"
                raise UpcycleError(key, got=masked_text(value), expected=expected, fix="write the value itself")
            for dots, key in _REFERENCE.findall(value) if isinstance(value, str) else ():
                if key.endswith("$"):
                    got, fix = f"{value} of {'.'.join(at)}", "write out the inner one"
                    raise UpcycleError(where, got=got, expected="no reference in a reference", fix=fix)
                place = (*at[: -len(dots)], *_parts(key)) if dots else _parts(key)
                if (found := _found(content, place)) is not None:
                    size += size_of(found, place, depth + 1)
        require_size(where, size, "references", depth)
        sizes[at] = size
        return size

    size_of(content, (), 0)
    return OmegaConf.to_container(config, resolve=True)


def _parts(key: str) -> tuple[str, ...]:
    """Return the keys that lead to what a reference names, as `a.b[0]`."""
    return tuple(part for part in re.split(r"[.\[\]]+", key.strip()) if part)


def _found(content: Any, place: tuple[str, ...]) -> Any:
    """Look up the value at a place; None if there is none, as for a variable of the environment."""
    for key in place:
        entries = dict(enumerate(content)) if isinstance(content, list) else content
        content = {str(name): one for name, one in entries.items()}.get(key) if isinstance(entries, dict) else None
    return content


def require_size(where: str, size: int, what: str, depth: int) -> None:
    """Check that YAML stays small when it is written out.

    Args:
        where: where it stands, for errors.
        size: its characters, with `VALUE_CHARACTERS` more for each value.
        what: what makes it larger: aliases or references.
        depth: how deep its values lie in each other.

    Raises:
        UpcycleError: it is too long or too deep.
    """
    if size > MAX_CHARACTERS:
        got = f"{size:,} characters with its {what} written out, {VALUE_CHARACTERS} more for each value"
        raise UpcycleError(where, got=got, expected=f"at most {MAX_CHARACTERS:,}", fix="make it smaller")
    if depth > MAX_DEPTH:
        got = f"more than {MAX_DEPTH} values in each other, with {what}"
        raise UpcycleError(where, got=got, expected=f"at most {MAX_DEPTH}", fix="make it flatter")
