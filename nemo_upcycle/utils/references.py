"""Write out the references in files of OmegaConf.

Only files of executors may compute values, as `${oc.env:HOME}` does: the others are copied into what is published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.masking import masked_text


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
    """Return a configuration of OmegaConf's as plain values, with its references written out.

    Args:
        config: the configuration.
        where: where it stands, for errors.
        computes: whether it may read the environment.

    Raises:
        UpcycleError: a value is computed, and must not be.
    """
    from omegaconf import OmegaConf

    if not computes:
        for at, text in _texts(OmegaConf.to_container(config)):
            if _COMPUTED.search(text):
                key = f"{where}: {'.'.join(at)}"
                raise UpcycleError(
                    key,
                    kind="refused",
                    got=f"is {masked_text(text)}: only an executor's file may read the environment or compute values",
                    fix="write the value itself",
                )
    return OmegaConf.to_container(config, resolve=True)


def _texts(content: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every text in plain values, with the keys that lead to it."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _texts(value, (*at, str(key)))
    elif isinstance(content, str):
        yield at, content
