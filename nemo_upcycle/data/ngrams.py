"""Find passages of evaluation items in text, by the hashes of n-grams of words.

Needs numpy and the standard library only: the engine of the data stage runs in an environment without torch.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_upcycle.data.word_hashes import HashFilter, look_up, normalise, origin, word_blocks
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import whole_file


if TYPE_CHECKING:
    from nemo_upcycle.suites.items import Item

WORDS = 13
SHORTEST = 6
BOILERPLATE = 10
#: Characters removed on both sides of a passage.
MARGIN = 200

_FORMAT = 1
_LAST_BLANK = re.compile(r"\s\S*\Z")
_FIRST_BLANK = re.compile(r"\s")
_MORE = 50


@dataclass(frozen=True)
class Hit:
    """A passage that shares n-grams with items.

    Attributes:
        start: its first character in the text.
        stop: one past its last character.
        size: words in it.
        items: numbers of the items, ascending, as `NgramIndex.item` names them.
    """

    start: int
    stop: int
    size: int
    items: tuple[int, ...]


@dataclass
class NgramIndex:
    """The n-grams of evaluation items, and where each stands.

    Attributes:
        arrays: what `save` writes. `hashes` are sorted; `places[bounds[i]:bounds[i + 1]]` are the numbers of the items
            that contain n-gram i.
    """

    arrays: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        self._words, self._shortest = (int(value) for value in self.arrays["settings"][1:3])
        self._hashes, self._sizes = self.arrays["hashes"], self.arrays["sizes"]
        self._lengths = [int(size) for size in np.unique(self._sizes) if size < self._words]
        self._long = HashFilter(self._hashes[self._sizes == self._words])
        self._short = HashFilter(self.arrays["beginnings"])

    @classmethod
    def build(
        cls, items: Iterable[Item], words: int = WORDS, shortest: int = SHORTEST, boilerplate: int = BOILERPLATE
    ) -> NgramIndex:
        """Index the n-grams of items; a rendering of fewer words is one n-gram of its own length.

        Args:
            items: items, numbered set by set, in the order given.
            words: words of an n-gram.
            shortest: renderings of fewer words are not indexed.
            boilerplate: an n-gram that stands in more items of one set is ignored.

        Example:
            >>> index = NgramIndex.build([Item("quiz", "1", ("Which of the two came first, and why?",))])
            >>> index.find("Asked which of the two came first and why, he smiled.")
            [Hit(start=6, stop=41, size=8, items=(0,))]
        """
        items = list(items)
        names = list(dict.fromkeys(item.name for item in items))
        items.sort(key=lambda item: names.index(item.name))  # stable
        hashes, owners, sizes, beginnings = _grams_of(items, words, shortest)
        name_of = np.array([names.index(item.name) for item in items], np.int32)

        order = np.lexsort((owners, hashes))
        hashes, owners, sizes = hashes[order], owners[order], sizes[order]
        once = _changes(hashes, owners)
        hashes, owners, sizes = hashes[once], owners[once], sizes[once]
        runs = np.flatnonzero(_changes(hashes, name_of[owners]))  # an n-gram in the items of one set
        lengths = np.diff(np.append(runs, len(hashes)))
        ignored = np.isin(hashes, hashes[runs[lengths > boilerplate]])

        def per_set(numbers: np.ndarray) -> np.ndarray:
            return np.bincount(name_of[numbers], minlength=len(names))

        every = np.arange(len(items))
        counts = [
            per_set(every),
            per_set(owners[runs[~ignored[runs]]]),
            per_set(owners[runs[ignored[runs]]]),
            per_set(np.setdiff1d(every, owners)),
            per_set(np.setdiff1d(owners, owners[~ignored])),
        ]
        hashes, owners, sizes = hashes[~ignored], owners[~ignored], sizes[~ignored]
        first = np.flatnonzero(_changes(hashes))
        return cls(
            {
                "settings": np.array([_FORMAT, words, shortest, boilerplate], np.int64),
                "hashes": hashes[first],
                "sizes": sizes[first],
                "bounds": np.append(first, len(hashes)).astype(np.int64),
                "places": owners,
                "beginnings": np.unique(beginnings),
                "names": np.array(names, np.str_),
                "name_of": name_of,
                "ids": np.array([item.id for item in items], np.str_),
                "counts": np.stack(counts, axis=1).astype(np.int64),
            }
        )

    def save(self, path: Path) -> None:
        """Write the index to `path`; the same items give the same bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as aside, aside.open("wb") as handle:
            np.savez(handle, **self.arrays)

    @classmethod
    def load(cls, path: Path) -> NgramIndex:
        """Read an index.

        Raises:
            UpcycleError: the file is missing, damaged, or of another version.
        """
        try:
            with path.open("rb") as handle:
                file = np.load(handle, allow_pickle=False)
                arrays = {name: file[name] for name in getattr(file, "files", ())}
            if int(arrays["settings"][0]) != _FORMAT:
                raise ValueError("another version")
            return cls(arrays)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UpcycleError(
                f"n-gram index {path}",
                got=error,
                expected=f"an index of version {_FORMAT}",
                fix="delete it and prepare the data again",
            ) from None

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """For each evaluation set, what the index covers.

        `items`; `ngrams`; `ignored`: n-grams in too many items; `too_short`: items that give no n-gram;
        `only_boilerplate`: items whose n-grams are all ignored.
        """
        columns = ("items", "ngrams", "ignored", "too_short", "only_boilerplate")
        names, counts = self.arrays["names"].tolist(), self.arrays["counts"].tolist()
        return {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, counts, strict=True)}

    def item(self, number: int) -> tuple[str, str]:
        """Return the evaluation set and the id of an item."""
        return str(self.arrays["names"][self.arrays["name_of"][number]]), str(self.arrays["ids"][number])

    def find(self, text: str) -> list[Hit]:
        """Return the passages that share n-grams with items, in order; n-grams that share words are one passage.

        Args:
            text: any text; its size is limited by memory only.
        """
        normalised = normalise(text)
        matches = sorted(self._find(normalised))
        if not matches:
            return []
        merged: list[tuple[int, int, int, int, set[int]]] = []
        for first, last, start, stop, entry in matches:
            numbers = self.arrays["places"][self.arrays["bounds"][entry] : self.arrays["bounds"][entry + 1]].tolist()
            if merged and first < merged[-1][1]:
                before = merged[-1]
                last, stop = max(last, before[1]), max(stop, before[3])
                merged[-1] = (before[0], last, before[2], stop, before[4].union(numbers))
            else:
                merged.append((first, last, start, stop, set(numbers)))
        places = origin(text)
        return [
            Hit(int(places[start]), int(places[stop - 1]) + 1, last - first, tuple(sorted(numbers)))
            for first, last, start, stop, numbers in merged
        ]

    def _find(self, normalised: bytes) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield each n-gram: its first word, one past its last, the bytes it stands in, and its place in `hashes`."""
        for block in word_blocks(normalised, self._words - 1):
            long = self._long.may_hold(block.grams(self._words))
            short = long[:0]
            if self._lengths:
                hashes = block.grams(self._shortest)
                short = self._short.may_hold(hashes)
                short = short[look_up(self.arrays["beginnings"], hashes[short])[1]]
            for size in (self._words, *self._lengths):
                at = long if size == self._words else short
                if not len(at) or not len(at := at[at + size < len(block.sums)]):
                    continue
                entries, same = look_up(self._hashes, block.grams(size, at))
                for word, entry in zip(at[same].tolist(), entries[same].tolist(), strict=True):
                    start, stop = int(block.starts[word]), int(block.stops[word + size - 1])
                    yield block.first + word, block.first + word + size, start, stop, entry


def cut(text: str, hits: Sequence[Hit], margin: int = MARGIN) -> list[str]:
    """Return what is left of a text without the passages and `margin` characters on both sides of them.

    Example:
        >>> cut("one two three four five six", [Hit(8, 13, 1, (0,))], margin=2)
        ['one', 'five six']
    """
    ends = [0, *(end for span in removed_spans(text, hits, margin) for end in span), len(text)]
    pieces = [text[start:stop] for start, stop in zip(ends[::2], ends[1::2], strict=True)]
    return [piece for piece in pieces if piece.strip()]


def removed_spans(text: str, hits: Sequence[Hit], margin: int = MARGIN) -> list[tuple[int, int]]:
    """Return what `cut` removes, in order: first character, one past the last.

    A span ends between two words where that takes at most 50 characters more.
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


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Return which rows differ from the row before; the first does."""
    changed = np.zeros(len(columns[0]), bool)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


def _grams_of(items: list[Item], words: int, shortest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the hash, the item and the size of every n-gram, and the hashes of how those of short items begin."""
    groups: dict[int, list[tuple[int, bytes]]] = {}
    for number, item in enumerate(items):
        for text in dict.fromkeys(map(normalise, item.renderings)):
            size = min(len(text.replace(b"\0", b" ").split()), words)
            if size >= shortest:
                groups.setdefault(size, []).append((number, text))
    hashes, owners, sizes, beginnings = ([np.empty(0, kind)] for kind in (np.uint64, np.int32, np.uint8, np.uint64))
    for size, members in sorted(groups.items()):
        joined = b"\0".join(text for _, text in members)
        ends = np.cumsum([len(text) + 1 for _, text in members])
        numbers = np.array([number for number, _ in members], np.int32)
        for block in word_blocks(joined, size - 1):
            begin = np.searchsorted(ends, block.starts, side="right")
            whole = np.flatnonzero(begin[: len(begin) + 1 - size] == begin[size - 1 :])
            hashes.append(block.grams(size, whole))
            owners.append(numbers[begin[whole]])
            sizes.append(np.full(len(whole), size, np.uint8))
            if size < words:
                beginnings.append(block.grams(shortest, whole))
    return np.concatenate(hashes), np.concatenate(owners), np.concatenate(sizes), np.concatenate(beginnings)
