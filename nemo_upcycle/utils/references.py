"""Resolve the references in OmegaConf files.

Only executor files may compute values, for example `${oc.env:HOME}`. All other files are copied into published
results, so they must not depend on the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.masking import masked_text


#: A value that OmegaConf computes from the environment (`${oc.env:HOME}`) or from anything else.
_COMPUTED = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^{}]*?:")
#: Backslashes and the start of a reference.
_REFERS = re.compile(r"(\\*)(\$\{)")


def escaped(content: Any) -> Any:
    """Escape the references in values, so that OmegaConf takes them for plain text."""
    if isinstance(content, dict):
        return {key: escaped(value) for key, value in content.items()}
    if isinstance(content, list):
        return [escaped(value) for value in content]
    return _REFERS.sub(r"\1\1\\\2", content) if isinstance(content, str) else content


def resolved(config: Any, where: str, *, computes: bool = False) -> Any:
    """Return an OmegaConf configuration as plain values, with references resolved.

    Args:
        config: OmegaConf configuration.
        where: source of the configuration, for errors.
        computes: whether the configuration may compute values and read the environment.

    Raises:
        UpcycleError: the configuration computes a value without permission.
    """
    from omegaconf import OmegaConf

    if not computes:
        for at, text in _texts(OmegaConf.to_container(config)):
            if _COMPUTED.search(text):
                key = f"{where}: {'.'.join(at)}"
                raise UpcycleError(
                    key,
                    kind="refused",
                    got=(
                        f"is {masked_text(text)}, but only an executor's file may read the environment or compute "
                        "values"
                    ),
                    fix="write the value itself",
                )
    return OmegaConf.to_container(config, resolve=True)


def _texts(content: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the keys that lead to each text in plain values, and the text."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _texts(value, (*at, str(key)))
    elif isinstance(content, str):
        yield at, content
