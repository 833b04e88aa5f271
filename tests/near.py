"""Changes that turn texts into near duplicates, for the tests and the benchmark of `near_duplicates`."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable


def change_words(text: str, chance: random.Random, one_in: int = 0) -> str:
    """Replace one word, or one word in every `one_in`, by another word."""
    words = re.split(r"(\s+)", text)
    places = [place for place, word in enumerate(words) if word.strip()]
    for place in chance.sample(places, max(1, len(places) // one_in) if one_in else 1):
        words[place] = "otherwise"
    return "".join(words)


def add_sentence(text: str, chance: random.Random) -> str:
    """Add a sentence before or after the text."""
    added = "This sentence was added by hand, and stands nowhere else."
    return f"{added} {text}" if chance.random() < 0.5 else f"{text} {added}"


def shuffle_paragraphs(text: str, chance: random.Random) -> str:
    """Reorder the paragraphs."""
    paragraphs = text.strip().split("\n\n")
    if len(paragraphs) < 2:
        return text
    chance.shuffle(paragraphs)
    return "\n\n".join(paragraphs)


Change = Callable[[str, random.Random], str]
#: Changes that exact deduplication ignores anyway. `near_duplicates` exists for the changes in `NEAR`.
EQUAL: dict[str, Change] = {
    "line ends of Windows": lambda text, _: text.replace("\n", "\r\n"),
    "letters and accents apart (NFD)": lambda text, _: unicodedata.normalize("NFD", text),
    "blanks doubled": lambda text, _: text.replace(" ", "  "),
    "empty lines doubled": lambda text, _: text.replace("\n\n", "\n\n\n\n"),
}
NEAR: dict[str, Change] = {
    "one word changed": change_words,
    "one word in 50 changed": lambda text, chance: change_words(text, chance, 50),
    "a sentence added": add_sentence,
    "paragraphs in another order": shuffle_paragraphs,
    "capitals": lambda text, _: text.upper(),
    "first tenth lost": lambda text, _: text[len(text) // 10 :],
}
