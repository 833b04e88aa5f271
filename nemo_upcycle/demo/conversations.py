"""The conversations of the demo: questions and answers of the `chatterbot` asset, as JSON lines of messages."""

from __future__ import annotations

import json
from pathlib import Path

from filelock import FileLock

from nemo_upcycle.demo.assets import ASSETS, fetch_asset
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.cache import writable_cache
from nemo_upcycle.utils.conf import read_yaml
from nemo_upcycle.utils.files import whole_file


#: The asset's files that answer questions; others chat, or give several answers to one question.
SUBJECTS = ("tech_support", "trivia", "coding")


def fetch_conversations(name: str) -> Path:
    """Return a file of conversations, fetched and written on first use.

    Args:
        name: of an asset of conversations: `chatterbot`.

    Raises:
        UpcycleError: there is no such asset, or it cannot be fetched.

    Example:
        >>> fetch_conversations("chatterbot").name  # doctest: +SKIP
        'chatterbot-1.3.3.jsonl'
    """
    known = [one for one, asset in ASSETS.items() if asset.kind == "conversations"]
    if name not in known:
        raise UpcycleError.unknown("asset of conversations", name, known)
    path = writable_cache("conversations") / f"{name}-{ASSETS[name].version}.jsonl"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            folder = fetch_asset(name)
            with whole_file(path) as aside:
                aside.write_text("".join(_lines(folder)), encoding="utf-8")
    return path


def _lines(folder: Path) -> list[str]:
    lines = []
    for subject in SUBJECTS:
        content = read_yaml(folder / f"{subject}.yml")
        for texts in content["conversations"]:
            if len(texts) == 2:
                roles = zip(("user", "assistant"), texts, strict=True)
                messages = [{"role": role, "content": str(text).strip()} for role, text in roles]
                lines.append(json.dumps({"messages": messages, "subject": subject}, ensure_ascii=False) + "\n")
    return lines
