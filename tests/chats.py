"""Conversations of a few words, and a tokenizer with a chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.models import write_tokenizer


#: As ChatML, with the end-of-text token behind each turn.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: One that leaves out, as some do, what stands in brackets in answers that are not the last.
FORGETS = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split(']')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_chat_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write the byte-level tokenizer of `write_tokenizer` with a chat template."""
    write_tokenizer(folder)
    if template:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}
        path.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def messages(*texts: str) -> list[dict[str, Any]]:
    """Return questions and answers in turn as messages."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def write_lines(path: Path, conversations: list[Any]) -> Path:
    """Write JSON lines; a text among them as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps({"messages": line}) for line in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sums(count: int = 40) -> list[list[dict[str, Any]]]:
    """Return so many conversations that ask for sums, some of two turns."""
    numbers = random.Random(0)
    found = []
    for a in range(count):
        b = numbers.randrange(100)
        texts = [f"{a} + {b}?", f"{a + b}."]
        if a % 3 == 0:
            texts += ["And one more?", f"{a + b + 1}."]
        found.append(messages(*texts))
    return found
