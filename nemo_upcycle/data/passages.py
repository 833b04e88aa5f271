"""Cut passages out of a text, and keep the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


#: Characters removed on both sides of a passage.
MARGIN = 200

_LAST_BLANK = re.compile(r"\s\S*\Z")
_FIRST_BLANK = re.compile(r"\s")
_MORE = 50


@dataclass(frozen=True)
class Hit:
    """A passage that shares n-grams with items.

    Attributes:
        start: position of the first character in the text.
        stop: position after the last character.
        size: number of words.
        items: numbers of the items, ascending; `NgramIndex.item` names them.
    """

    start: int
    stop: int
    size: int
    items: tuple[int, ...]


def cut(text: str, hits: Sequence[Hit], margin: int = MARGIN) -> list[str]:
    """Remove the passages, with `margin` characters on both sides of each, from a text; return the pieces.

    Example:
        >>> cut("one two three four five six", [Hit(8, 13, 1, (0,))], margin=2)
        ['one', 'five six']
    """
    ends = [0, *(end for span in removed_spans(text, hits, margin) for end in span), len(text)]
    pieces = [text[start:stop] for start, stop in zip(ends[::2], ends[1::2], strict=True)]
    return [piece for piece in pieces if piece.strip()]


def removed_spans(text: str, hits: Sequence[Hit], margin: int = MARGIN) -> list[tuple[int, int]]:
    """Find the spans that `cut` removes, in order: first character, one past the last.

    A span ends between two words if this makes the span at most 50 characters longer.
    """
    spans: list[tuple[int, int]] = []
    for hit in sorted(hits, key=lambda hit: hit.start):
        start, stop = max(hit.start - margin, 0), min(hit.stop + margin, len(text))
        before = _LAST_BLANK.search(text, max(start - _MORE, 0), start)
        after = _FIRST_BLANK.search(text, stop, stop + _MORE)
        start = before.start() if before else start if start > _MORE else 0
        stop = after.end() if after else stop if stop + _MORE < len(text) else len(text)
        if spans and start <= spans[-1][1]:
            start, stop = spans[-1][0], max(stop, spans.pop()[1])
        spans.append((start, stop))
    return spans
