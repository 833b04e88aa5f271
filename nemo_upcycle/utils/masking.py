"""Mask secrets in output and records. Only the owner can read files that must contain secrets.

A secret is recognised by its name, if the text gives a name, or by its value. Three kinds of values are recognised:
tokens with the prefix of a known service, user and password in an address (before the host), and parameters in an
address's query that are named like a secret or a signature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from nemo_upcycle.utils.files import whole_file


_T = TypeVar("_T")
#: Words in the names of variables that hold secrets, and ends of such names, in upper or lower case. A TOKENIZER is no
#: secret.
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL")
SECRET_ENDS = ("_AUTH", "_PASS", "_PWD")
MASK = "***"
_NAME = rf"\w*(?:(?:{'|'.join(SECRET_WORDS)})(?!IZER)\w*|(?:{'|'.join(SECRET_ENDS)}))"
#: Tokens with known prefixes: Hugging Face, OpenAI and Anthropic, GitHub, GitLab, Slack, AWS, NVIDIA, Google, W&B.
_TOKENS = (
    r"hf_[A-Za-z0-9]{16,}",
    r"sk-[\w-]{16,}",
    r"gh[pousr]_\w{16,}",
    r"github_pat_\w{16,}",
    r"gl(?:pat|dt|rt)-[\w-]{16,}",
    r"xox[a-z]-[\w-]{10,}",
    r"A(?:KIA|SIA)[A-Z0-9]{16}",
    r"nvapi-[\w-]{16,}",
    r"AIza[\w-]{35}",
    r"wandb_v\d_\w{16,}",
)
#: The tokens above, and `user:password@` in an address. A user name alone, as in ssh://git@host, is no secret.
_VALUE = re.compile(rf"(?<![\w-])(?:{'|'.join(_TOKENS)})|(?<=://)[^\s/?#'\"@:]*:[^\s/?#'\"]*@")
_SECRET = re.compile(_NAME, re.IGNORECASE)
#: A secret in the query of an address, for example `?token=...` or the signature in a signed address of S3, Azure or
#: Google. The `=` distinguishes a query from the `?` of a file pattern.
_QUERY = re.compile(
    r"(?P<name>[?&;](?:[\w.%-]*(?:token|secret|passw|passphrase|pwd|credential|signature|auth(?!or)|(?:access|api|_|-)key)"
    r"(?!izer)[\w.%-]*|key(?:id)?|apikey|pass|sig|sas|code|AWSAccessKeyId)=)[^&;\s'\"#<>,{}\]]+",
    re.IGNORECASE,
)
_QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*')"""
#: A named secret: NAME=VALUE as in a shell, or NAME: VALUE as in YAML. In YAML a value may contain blanks.
_SAID = re.compile(
    rf"""(?P<name>\b{_NAME}["']?\s*(?:(?P<yaml>:)|=)\s*)(?(yaml)(?:{_QUOTED}|[^,}}\n]+)|(?:{_QUOTED}|[^\s,}}"';])+)""",
    re.IGNORECASE,
)


def is_secret(name: object) -> bool:
    """Return whether a variable's name says that it holds a secret.

    Example:
        >>> is_secret("HF_TOKEN"), is_secret("TOKENIZERS_PARALLELISM")
        (True, False)
    """
    return _SECRET.fullmatch(str(name)) is not None


def masked(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return variables with secrets masked: values of variables named like secrets, and secrets in other values."""
    return {name: MASK if is_secret(name) else without_secrets(value) for name, value in variables.items()}


def without_secrets(value: _T) -> _T:
    """Return a value, and mask every secret in it that can be recognised without a name.

    Args:
        value: text, or a JSON value whose texts are masked.

    Example:
        >>> without_secrets(["postgres://me:pw@host/db", "https://host/a?part=1&sig=x%2Fy", "ssh://git@host"])
        ['postgres://***@host/db', 'https://host/a?part=1&sig=***', 'ssh://git@host']
    """
    hidden: Any = value
    if isinstance(value, str):
        hidden = _VALUE.sub(lambda found: f"{MASK}@" if found[0].endswith("@") else MASK, value)
        hidden = _QUERY.sub(rf"\g<name>{MASK}", hidden) if "=" in hidden else hidden
    elif isinstance(value, Mapping):
        hidden = {without_secrets(name): without_secrets(one) for name, one in value.items()}
    elif isinstance(value, list):
        hidden = [without_secrets(one) for one in value]
    elif isinstance(value, tuple):
        hidden = tuple(without_secrets(one) for one in value)
    return cast("_T", hidden)


def masked_text(text: str) -> str:
    """Return a text with secrets masked: values with a secret's name, and values recognised without a name.

    Example:
        >>> masked_text("run.executor.env_vars={HF_TOKEN: hf_abc, HF_HOME: /hf}")
        'run.executor.env_vars={HF_TOKEN: ***, HF_HOME: /hf}'
    """
    return without_secrets(_SAID.sub(rf"\g<name>{MASK}", text))


def write_private(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file atomically. If the text contains secrets, make the file readable by the owner only.

    Args:
        path: the file.
        text: content of the file.
        private: whether the text holds secrets that `without_secrets` does not recognise.
    """
    with whole_file(path) as aside:
        aside.touch(mode=0o600 if private or without_secrets(text) != text else 0o666)
        aside.write_text(text, encoding="utf-8")
