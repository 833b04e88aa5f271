"""Read conversations: JSON lines of `messages`, each checked; what is wrong is named by file, line and field."""

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
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """One conversation, up to its last answer.

    Attributes:
        place: file and line, `mine.jsonl:17`.
        messages: dicts with `role` and `content`, and what else a template reads of them.
        tools: as the line names them, for templates that show them; None: none.
    """

    place: str
    messages: Messages
    tools: list[Any] | None = None

    @property
    def question(self) -> str:
        """Return the hash of what stands before the first answer: conversations that share it share their split."""
        return _digest(self.messages[: self.answers()[0]])

    @property
    def whole(self) -> str:
        """Return the hash of all of it."""
        return _digest([*self.messages, {"tools": self.tools}])

    def answers(self) -> list[int]:
        """Return the positions of the answers among the messages."""
        return [number for number, message in enumerate(self.messages) if message["role"] == ANSWER]


@dataclass(frozen=True)
class Problem:
    """Why a line is not taken.

    Attributes:
        place: file and line.
        field: of the line, as `messages[1].content`.
        reason: what is wrong, in a few words that many lines may share.
    """

    place: str
    field: str
    reason: str

    def error(self) -> UpcycleError:
        """Return it as the error that ends a strict build."""
        where = f"{self.place}: {self.field}" if self.field else self.place
        return UpcycleError(where, got=self.reason, expected="a conversation", fix="correct or delete the line")


def read_conversations(
    path: Path, special_tokens: Collection[str] = (), called: str = ""
) -> Iterator[Conversation | Problem]:
    """Yield what stands in each line of a file that is not blank.

    Args:
        path: JSON lines; each an object with `messages`, a list of objects with `role` and `content`.
        special_tokens: names that may not stand in a content: the tokenizer would take them for the tokens, and who
            wrote the text could end a turn within it.
        called: what places call the file; empty: its name.

    Raises:
        UpcycleError: the file cannot be read.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _conversation(f"{called or path.name}:{number}", line, special_tokens)
    except OSError as error:
        raise UpcycleError(str(path), got=error.strerror, expected="JSON lines", fix="check the path") from None


def _conversation(place: str, line: bytes, special_tokens: Collection[str]) -> Conversation | Problem:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Problem(place, "", "not UTF-8")
    except (ValueError, RecursionError):
        return Problem(place, "", "broken JSON")
    if not isinstance(value, dict):
        return Problem(place, "", "no JSON object")
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        return Problem(place, "messages", "no list of messages" if "messages" in value else "missing")
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        return Problem(place, "tools", "no list")
    for number, message in enumerate(messages):
        if found := _problem(message, special_tokens):
            name, reason = found
            return Problem(place, f"messages[{number}]{name}", reason)
    while messages and messages[-1]["role"] != ANSWER:
        messages.pop()
    if len(messages) < 2:
        return Problem(place, "messages", "no answer" if not messages else "no question")
    if messages[0]["role"] == ANSWER:
        return Problem(place, "messages[0].role", "an answer before any question")
    return Conversation(place, messages, tools)


def _problem(message: Any, special_tokens: Collection[str]) -> tuple[str, str] | None:
    """Return field and reason of what is wrong with a message."""
    if not isinstance(message, dict):
        return "", "no JSON object"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return ".role", f"none of {', '.join(ROLES)}"
    if content is None and role == ANSWER and message.get("tool_calls"):
        message["content"] = ""
        return None
    if not isinstance(content, str):
        return ".content", "missing" if content is None else "no text"
    if role == ANSWER and not content.strip() and not message.get("tool_calls"):
        return ".content", "an empty answer"
    try:
        content.encode()
    except UnicodeEncodeError:
        return ".content", "half of a surrogate pair"
    if any(name in content for name in special_tokens):
        return ".content", "the name of a special token"
    return None


def _digest(messages: Messages) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
