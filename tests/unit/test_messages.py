"""All messages are in one file, to be read as users see them."""

from __future__ import annotations

from tests.golden.messages import MESSAGES, messages_text


def test_every_message_is_in_the_golden_file() -> None:
    """After an intended change, run `python -m tests.golden`, then read the difference."""
    assert messages_text() == MESSAGES.read_text(encoding="utf-8")
