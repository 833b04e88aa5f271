"""Hide secrets in what is printed and recorded; what needs them is written for its owner alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.utils.files import whole_file


#: What the name of a variable that holds a secret contains, in any case; a TOKENIZER is none.
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
MASK = "***"
_NAME = rf"\w*(?:{'|'.join(SECRET_WORDS)})(?!IZER)\w*"
_SECRET = re.compile(_NAME, re.IGNORECASE)
_QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*')"""
#: NAME=VALUE as in a shell, and NAME: VALUE as in YAML, where a blank ends no value.
_SAID = re.compile(
    rf"""(?P<name>\b{_NAME}["']?\s*(?:(?P<yaml>:)|=)\s*)(?(yaml)(?:{_QUOTED}|[^,}}\n]+)|(?:{_QUOTED}|[^\s,}}"';])+)""",
    re.IGNORECASE,
)


def is_secret(name: object) -> bool:
    """Return whether a variable holds a secret, as its name says.

    Example:
        >>> is_secret("HF_TOKEN"), is_secret("TOKENIZERS_PARALLELISM")
        (True, False)
    """
    return _SECRET.fullmatch(str(name)) is not None


def masked(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return variables with the values of secret ones hidden."""
    return {name: MASK if is_secret(name) else value for name, value in variables.items()}


def masked_text(text: str) -> str:
    """Return a text with what it gives secret names hidden.

    Example:
        >>> masked_text("run.executor.env_vars={HF_TOKEN: hf_abc, HF_HOME: /hf}")
        'run.executor.env_vars={HF_TOKEN: ***, HF_HOME: /hf}'
    """
    return _SAID.sub(rf"\g<name>{MASK}", text)


def write_private(path: Path, text: str, *, private: bool) -> None:
    """Write a text file whole; where it holds secrets, no other user may read it.

    Args:
        path: of the file.
        text: its content.
        private: whether it holds secrets.
    """
    with whole_file(path) as aside:
        aside.touch(mode=0o600 if private else 0o666)
        aside.write_text(text, encoding="utf-8")
