"""Hide secrets in what is printed and recorded; what needs them is written for its owner alone.

A secret is told by its name, where a text gives it one, and by its value: a token of a service that marks its own, and
what an address has before its host or, under the name of a secret or a signature, in its query.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from nemo_upcycle.utils.files import whole_file


_T = TypeVar("_T")
#: What the name of a variable that holds a secret contains, in any case; a TOKENIZER is none. And how such names end.
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL")
SECRET_ENDS = ("_AUTH", "_PASS", "_PWD")
MASK = "***"
_NAME = rf"\w*(?:(?:{'|'.join(SECRET_WORDS)})(?!IZER)\w*|(?:{'|'.join(SECRET_ENDS)}))"
#: Tokens by what they begin with: Hugging Face, OpenAI and Anthropic, GitHub, GitLab, Slack, AWS, NVIDIA, Google, W&B.
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
#: Those, and `user:password@` of an address; a name alone, as in ssh://git@host, is no secret.
_VALUE = re.compile(rf"(?<![\w-])(?:{'|'.join(_TOKENS)})|(?<=://)[^\s/?#'\"@:]*:[^\s/?#'\"]*@")
_SECRET = re.compile(_NAME, re.IGNORECASE)
#: The value of a secret in the query of an address, as in `?token=...`, and in the signed addresses of S3, Azure and
#: Google; a `?` of a pattern for files has no `=` behind it.
_QUERY = re.compile(
    r"(?P<name>[?&;](?:[\w.%-]*(?:token|secret|passw|passphrase|pwd|credential|signature|auth(?!or)|(?:access|api|_|-)key)"
    r"(?!izer)[\w.%-]*|key(?:id)?|apikey|pass|sig|sas|code|AWSAccessKeyId)=)[^&;\s'\"#<>,{}\]]+",
    re.IGNORECASE,
)
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
    return {name: MASK if is_secret(name) else without_secrets(value) for name, value in variables.items()}


def without_secrets(value: _T) -> _T:
    """Return a value, of texts in lists and mappings, with what is a secret by itself hidden.

    Args:
        value: a text, or what JSON holds.

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
    """Return a text with what it gives secret names hidden, and what is a secret by itself.

    Example:
        >>> masked_text("run.executor.env_vars={HF_TOKEN: hf_abc, HF_HOME: /hf}")
        'run.executor.env_vars={HF_TOKEN: ***, HF_HOME: /hf}'
    """
    return without_secrets(_SAID.sub(rf"\g<name>{MASK}", text))


def write_private(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file whole; where it holds secrets, no other user may read it.

    Args:
        path: the file.
        text: its content.
        private: whether it holds secrets that it does not show by themselves.
    """
    with whole_file(path) as aside:
        aside.touch(mode=0o600 if private or without_secrets(text) != text else 0o666)
        aside.write_text(text, encoding="utf-8")
