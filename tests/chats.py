"""Short conversations, and a tokenizer with a chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.models import write_tokenizer


#: A template like ChatML, with the end-of-text token after each turn.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: A template that drops bracketed text from every answer except the last, as some published templates do.
FORGETS = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split(']')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: A template much like Qwen's: it writes tools, the thoughts of the last answer, tool calls and tool results.
TOOLS = (
    "{% if tools %}system: {{ tools | tojson }}</s>{% endif %}"
    "{% for message in messages %}{{ message.role }}: "
    "{% if loop.last and message.reasoning_content %}[{{ message.reasoning_content }}]{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}</s>{% endfor %}"
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
    """Return alternating questions and answers as messages."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def asks_tool(question: str = "Warm?") -> list[dict[str, Any]]:
    """Return a question, a tool call in OpenAI's form, the tool's result, and the answer."""
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "5 degrees"},
        {"role": "assistant", "content": "No."},
    ]


def write_lines(path: Path, conversations: list[Any]) -> Path:
    """Write conversations as JSON lines; strings are written unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps({"messages": line}) for line in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sums(count: int = 40) -> list[list[dict[str, Any]]]:
    """Return `count` conversations that ask for sums; every third has two turns."""
    numbers = random.Random(0)
    found = []
    for a in range(count):
        b = numbers.randrange(100)
        texts = [f"{a} + {b}?", f"{a + b}."]
        if a % 3 == 0:
            texts += ["And one more?", f"{a + b + 1}."]
        found.append(messages(*texts))
    return found
