"""Turn text into words and hash them and their n-grams, a block of text at a time.

This module needs only numpy and the standard library, because the data engine's environment has no torch.

A word is a sequence of letters and digits, case-folded and without accents. In scripts without blanks, each character
is a word. Letters of other scripts that look like Latin letters become Latin letters. Apostrophes are deleted. All
other characters, dashes included, separate words. HTML tags and entities also separate words. So typography and line
breaks make no difference. Each character is translated separately, so positions can be mapped back.

The hash of a word is a polynomial of its UTF-8 bytes. The hash of an n-gram is a polynomial of its words' hashes. Both
hashes are computed modulo 2**64 from differences of running sums, with a few numpy operations for a whole block.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


_SEPARATOR = "\0"
_APOSTROPHES = "'`\u00b4\u02b9\u02bb\u02bc\u02bd\u2018\u2019\u201a\u201b\u2032\uff07"
_DELETED = b"'`"  # the ASCII apostrophes
_ASCII = bytes(code if code > 127 or chr(code).isalnum() else 0 for code in range(256)).lower()
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_BLOCK = 1 << 15  # bytes hashed at a time: they fit into the processor's cache
_SLOTS = 8  # slots for each hash in each table of the filter
#: Lower-case Cyrillic, Greek and phonetic letters that look like Latin letters. If a capital letter and its lower case
#: look like different letters, the lower case counts, so that case makes no difference.
_LOOK_ALIKES = str.maketrans(
    "\u0430\u0432\u0435\u043a\u043c\u043d\u043e\u0440\u0441\u0442\u0443\u0445\u0455\u0456\u0458\u04af\u04bb\u04cf\u0501\u051b\u051d"
    "\u03b1\u03b2\u03b3\u03b5\u03b7\u03b9\u03ba\u03bc\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7\u03c9\u0131\u0251\u0261",
    "abekmhopctyxsijyhldqwabyenikuvoptuxwiag",
)
_HANGUL = "\u1100-\u115f"  # consonants that begin a syllable, as decomposed text spells them
#: Han, kana and Hangul; Thai, Lao, Tibetan, Burmese and Khmer.
SYLLABLES = f"{_HANGUL}\u3040-\u30ff\u3105-\u312f\u31f0-\u31ff\u3400-\u9fff\U00020000-\U0003ffff"
LETTERS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
_ALONE = re.compile(f"[{SYLLABLES}{LETTERS}]")
_BEGINS_SYLLABLE = re.compile(f"[{_HANGUL}]")
_TAG = re.compile(
    r"</?(?:a|abbr|b|big|blockquote|br|center|cite|code|dd|del|div|dl|dt|em|font|h[1-6]|hr|i|ins|kbd|li|mark|ol|p|pre|q|s"
    r"|small|span|strike|strong|sub|sup|t[drh]|table|tbody|tt|u|ul|var)(?:\s[^<>=]{1,20}=[^<>]{0,200})?\s?/?>",
    re.IGNORECASE,
)
#: Pattern of a number at the start of a line, and minimum length of a series of such numbers that increase by one. The
#: numbers of a shorter series may be part of the text; longer series are line numbers, which items do not have.
_NUMBERED, _LINES = re.compile(r"\n[ \t]*(\d{1,9})(?=[\s.:)|])"), 5
_ENTITY = re.compile("&(?:nbsp|amp|quot|lt|gt|[lr]dquo|[mn]dash|hellip|(#0?39|#x27|#821[67]|apos|[lr]squo));")


def _powers(base: int) -> np.ndarray:
    bases = np.full(_BLOCK + 1, base, np.uint64)
    bases[0] = 1
    return np.multiply.accumulate(bases)


_BYTE_POWERS = _powers(0x9E3779B97F4A7C15)
_WORD_POWERS = _powers(0xD6E8FEB86659FD93)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


class _Fold(dict):
    """Maps a code point to its letters and digits, to separators, or to nothing, for `str.translate`."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kept = ""
        for part in unicodedata.normalize("NFKD", char).casefold() if char not in _APOSTROPHES else "":
            category = unicodedata.category(part)
            if part.isalnum() or category == "Mc":
                kept += "" if part in _APOSTROPHES else part.translate(_LOOK_ALIKES)
            elif category not in ("Mn", "Me", "Cf"):
                kept += _SEPARATOR
        if _BEGINS_SYLLABLE.match(kept):  # the rest of a decomposed syllable follows
            kept = _SEPARATOR + kept
        elif _ALONE.match(kept):
            kept = _SEPARATOR + kept + _SEPARATOR
        self[code] = kept
        return kept


_FOLD = _Fold()


def normalise(text: str) -> bytes:
    """Return the words of a text in UTF-8, with at least one zero byte between two words.

    Example:
        >>> normalise("Don’t STOP—now").split(b"\\0")
        [b'dont', b'stop', b'now']
    """
    text = _without_markup(text)
    if not text.isascii():
        text = _NOT_ASCII.sub(lambda run: run.group().translate(_FOLD), text)
    return text.encode("utf-8").translate(_ASCII, _DELETED)


def _without_markup(text: str) -> str:
    """Return a text of the same length, with tags and line numbers blanked, and entities of apostrophes replaced."""
    if "<" in text:
        text = _TAG.sub(lambda tag: " " * len(tag.group()), text)
    if "&" in text:
        text = _ENTITY.sub(lambda entity: ("'" if entity[1] else " ") * len(entity.group()), text)
    return _without_line_numbers(text)


def _without_line_numbers(text: str) -> str:
    rows: list[list[re.Match[str]]] = []
    for number in _NUMBERED.finditer(text):
        if rows and int(number[1]) == int(rows[-1][-1][1]) + 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    places = {number.start() for row in rows if len(row) >= _LINES for number in row}
    if not places:
        return text
    return _NUMBERED.sub(lambda number: " " * len(number[0]) if number.start() in places else number[0], text)


def origin(text: str) -> np.ndarray:
    """Return, for each byte of the normalised text, the position of the character that it comes from."""
    text = _without_markup(text)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    widths = np.zeros(int(codes.max(initial=0)) + 1, np.uint8)
    for char in set(text):
        widths[ord(char)] = len(normalise(char))
    return np.repeat(np.arange(len(codes)), widths[codes])


@dataclass
class WordBlock:
    """Consecutive words of a normalised text: their bytes, and running sums of their hashes."""

    first: int
    starts: np.ndarray
    stops: np.ndarray
    sums: np.ndarray

    def grams(self, size: int, at: np.ndarray | None = None) -> np.ndarray:
        """Return the hashes of all n-grams of `size` words, or only of n-grams that start at the words `at`."""
        if at is None:
            count = max(len(self.starts) + 1 - size, 0)
            powers = _WORD_POWERS[len(_WORD_POWERS) - count :][::-1]
            return (self.sums[size : size + count] - self.sums[:count]) * powers
        return (self.sums[at + size] - self.sums[at]) * _WORD_POWERS[_BLOCK - at]


def word_blocks(normalised: bytes, overlap: int) -> Iterator[WordBlock]:
    """Yield the words of a normalised text, block by block; a block first repeats the `overlap` words before it."""
    starts = stops = np.empty(0, np.int64)
    hashes = np.empty(0, np.uint64)
    first = begin = 0
    limit = _BLOCK - 2 * overlap
    while begin < len(normalised):
        end = min(begin + limit, len(normalised))
        if end < len(normalised):  # cut between two words, but divide a word that fills a block
            end = normalised.rfind(0, begin + 1, end) + 1 or end
        letters = np.zeros(end - begin + 2, np.uint8)
        letters[1:-1] = np.frombuffer(normalised, np.uint8, end - begin, begin)
        inside = letters != 0
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        sums = np.zeros(len(letters) - 1, np.uint64)
        np.multiply(letters[1:-1], _BYTE_POWERS[: end - begin], out=sums[1:], dtype=np.uint64)
        np.cumsum(sums, out=sums)
        new_starts, new_stops = edges[::2], edges[1::2]
        new = (sums[new_stops] - sums[new_starts]) * _BYTE_POWERS[_BLOCK - new_starts]
        new ^= new >> np.uint64(32)
        new *= _MIX
        new ^= new >> np.uint64(29)
        kept = max(len(hashes) - overlap, 0)
        first += kept
        if begin:
            new_starts, new_stops = new_starts + begin, new_stops + begin
            new_starts = np.concatenate((starts[kept:], new_starts))
            new_stops = np.concatenate((stops[kept:], new_stops))
            new = np.concatenate((hashes[kept:], new))
        starts, stops, hashes = new_starts, new_stops, new
        running = np.zeros(len(hashes) + 1, np.uint64)
        np.cumsum(hashes * _WORD_POWERS[: len(hashes)], out=running[1:])
        yield WordBlock(first, starts, stops, running)
        begin = end


def grams_of(normalised: bytes, size: int) -> Iterator[np.ndarray]:
    """Yield the hashes of all n-grams of `size` words of a normalised text, block by block."""
    return (block.grams(size) for block in word_blocks(normalised, size - 1))


def joined(hashes: Iterable[np.ndarray]) -> np.ndarray:
    """Join arrays of hashes; without arrays, return an empty array."""
    return np.concatenate([np.empty(0, np.uint64), *hashes])


class HashFilter:
    """Two tables, indexed by the first and the last bits of a hash, that exclude most hashes outside a set."""

    def __init__(self, hashes: np.ndarray) -> None:
        width = max((_SLOTS * len(hashes)).bit_length(), 16)
        self._shift, self._mask = np.uint64(64 - width), np.uint64((1 << width) - 1)
        self._first, self._last = (np.zeros(1 << width, bool) for _ in range(2))
        self._first[(hashes >> self._shift).view(np.int64)] = True
        self._last[(hashes & self._mask).view(np.int64)] = True

    def may_hold(self, hashes: np.ndarray) -> np.ndarray:
        """Return the positions of the hashes that may be in the set."""
        at = np.flatnonzero(self._first[(hashes >> self._shift).view(np.int64)])
        return at[self._last[(hashes[at] & self._mask).view(np.int64)]]


def look_up(members: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of hashes among sorted members, and which hashes are members."""
    entries = np.minimum(np.searchsorted(members, hashes), len(members) - 1)
    return entries, members[entries] == hashes
