"""Read conversations from JSON lines and check each; an invalid line is reported by file, line and field.

A conversation has OpenAI's format (`messages`) or ShareGPT's (`conversations`). Both formats are converted to the same
messages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError


ANSWER = "assistant"
ROLES = ("system", "user", ANSWER, "tool")
_MESSAGES, _SHAREGPT = "messages", "conversations"
#: ShareGPT's role -> our role, and our field name -> ShareGPT's field name.
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": ANSWER}
_SHAREGPT_NAMES = {"role": "from", "content": "value"}
_CALLS = ("tool_calls", "function_call")
#: Fields that an answer may have besides its content, under the names that model APIs use.
BESIDE = (*_CALLS, "reasoning_content", "reasoning", "thinking")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """One conversation, up to the last answer to train on.

    Attributes:
        place: file and line, `mine.jsonl:17`.
        messages: dicts with `role`, `content` and other fields that a template reads; `weight` 0 excludes a message
            from the loss.
        tools: tools that the line lists, for templates that show tools; None if the line lists no tools.
        field: field of the line that holds the messages: `messages`, or `conversations` in ShareGPT's form.
    """

    place: str
    messages: Messages
    tools: list[Any] | None = None
    field: str = _MESSAGES

    @property
    def question(self) -> str:
        """Return the hash of the messages before the first answer; conversations with equal hashes share a split."""
        roles = [message["role"] for message in self.messages]
        return _digest(self.messages[: roles.index(ANSWER)])

    @property
    def whole(self) -> str:
        """Return the hash of the whole conversation, tools included."""
        return _digest([*self.messages, {"tools": self.tools}])

    def answers(self) -> list[int]:
        """Return the positions of the messages that are answers to train on."""
        return [number for number, message in enumerate(self.messages) if _is_learned(message)]


@dataclass(frozen=True)
class Problem:
    """The reason why a line is omitted.

    Attributes:
        place: file and line.
        field: field of the line, such as `messages[1].content`.
        reason: short description of the mistake; all lines with this mistake have the same description.
        fix: remedy.
    """

    place: str
    field: str
    reason: str
    fix: str = "correct or delete the line"

    def error(self) -> UpcycleError:
        """Return the problem as the error that ends a strict build."""
        where = f"{self.place}: {self.field}" if self.field else self.place
        got = "is missing" if self.reason == "missing" else f"is invalid: {self.reason}"
        return UpcycleError(where, kind="state", got=got, fix=self.fix)


def read_conversations(
    path: Path, special_tokens: Collection[str] = (), called: str = ""
) -> Iterator[Conversation | Problem]:
    """Yield the conversation or the problem of each line of a file, except blank lines.

    Args:
        path: file of JSON lines. Each line is an object with `messages` (objects with `role` and `content`) or with
            `conversations` (objects with `from` and `value`).
        special_tokens: names that no content may contain. The tokenizer would read these names as special tokens, so
            that a name inside a text could end the turn.
        called: file name to show in each `place`; empty means the file's own name.

    Raises:
        UpcycleError: the file cannot be read.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _conversation(f"{called or path.name}:{number}", line, special_tokens)
    except OSError as error:
        raise UpcycleError(
            str(path), kind="state", got=f"cannot be read: {error.strerror}", fix="check the path"
        ) from None


def _conversation(place: str, line: bytes, special_tokens: Collection[str]) -> Conversation | Problem:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Problem(place, "", "not UTF-8")
    except (ValueError, RecursionError):
        return Problem(place, "", "broken JSON")
    if not isinstance(value, dict):
        return Problem(place, "", "no JSON object")
    field = _SHAREGPT if _SHAREGPT in value and value.get(_MESSAGES) is None else _MESSAGES
    names = _SHAREGPT_NAMES if field == _SHAREGPT else {}
    messages = value.get(field)
    if not isinstance(messages, list) or not messages:
        fix = 'write {"messages": [...]} or {"conversations": [...]}; texts without them are for `nemo-upcycle data`'
        return Problem(place, field, "no list of messages" if field in value else "missing", fix)
    if field == _SHAREGPT and value.get("system"):
        return Problem(place, "system", "beside the conversation", "write it as the first turn, from system")
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        return Problem(place, "tools", "no list")
    if reason := _unwritable(tools, special_tokens):
        return Problem(place, "tools", reason)
    for number, message in enumerate(messages):
        if field == _SHAREGPT and isinstance(message, dict):
            if str(message.get("from")) not in _SHAREGPT_ROLES:
                return Problem(place, f"{field}[{number}].from", f"none of {', '.join(_SHAREGPT_ROLES)}")
            messages[number] = _from_sharegpt(message)
        if found := _problem(messages[number], special_tokens):
            name, reason = found
            return Problem(place, ".".join(filter(None, (f"{field}[{number}]", names.get(name, name)))), reason)
    while messages and not _is_learned(messages[-1]):
        messages.pop()
    if len(messages) < 2:
        return Problem(place, field, "no answer to learn" if not messages else "no question")
    if messages[0]["role"] == ANSWER:
        return Problem(place, f"{field}[0].{names.get('role', 'role')}", "an answer before any question")
    return Conversation(place, messages, tools, field)


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn of ShareGPT as a message: `from` is the role, `value` the content."""
    others = {name: value for name, value in turn.items() if name not in _SHAREGPT_NAMES.values()}
    return {**others, "role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}


def _problem(message: Any, special_tokens: Collection[str]) -> tuple[str, str] | None:
    """Return field and reason of the first mistake in a message, or None."""
    if not isinstance(message, dict):
        return "", "no JSON object"
    role = message.get("role")
    if role not in ROLES:
        return "role", f"none of {', '.join(ROLES)}"
    if message.get("weight") not in ((None, 0, 1) if role == ANSWER else (None, 0)):
        return "weight", "neither 0 nor 1" if role == ANSWER else "on what is no answer"
    if reason := _wrong_calls(message):
        return "tool_calls", reason
    is_call = role == ANSWER and any(map(message.get, _CALLS))
    if is_call and message.get("content") is None:
        message["content"] = ""
    if isinstance(message.get("content"), list) and (reason := _join_parts(message)):
        return "content", reason
    content = message.get("content")
    if not isinstance(content, str):
        return "content", "missing" if content is None else "not a string"
    if role == ANSWER and not content.strip() and not is_call:
        return "content", "an empty answer"
    for name in ("content", *BESIDE):
        if reason := _unwritable(message.get(name), special_tokens):
            return name, reason
    return None


def _join_parts(message: dict[str, Any]) -> str:
    """Replace the parts of a message's content by their text; return why a part cannot be read, or ""."""
    for part in message["content"]:
        if not isinstance(part, dict):
            return "a part that is no JSON object"
        if part.get("type") != "text":
            return f"a part of type {ascii(part.get('type'))[:40]}; only text parts are read"
        if not isinstance(part.get("text"), str):
            return "a text part without text"
    message["content"] = "".join(part["text"] for part in message["content"])
    return ""


def _wrong_calls(message: dict[str, Any]) -> str:
    """Parse tool-call arguments that are JSON strings, since templates want objects; return the mistake, or ""."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return "no list of JSON objects"
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "a call without the name of a function"
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                return "a call with broken JSON in its arguments"
    return ""


def _unwritable(value: Any, special_tokens: Collection[str]) -> str:
    """Return why a value may not appear in a conversation, or "" if it may."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return "the name of a special token" if any(name in text for name in special_tokens) else ""


def _is_learned(message: dict[str, Any]) -> bool:
    return message["role"] == ANSWER and message.get("weight") != 0


def _digest(messages: Messages) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
