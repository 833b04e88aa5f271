"""Find passages of evaluation items in text, by the hashes of n-grams of words.

This module needs only numpy and the standard library, because the data engine's environment has no torch.

One pass searches for two kinds of n-grams. A long n-gram is a hit by itself. Short n-grams are a hit if enough short
n-grams of the same item are close together (see `ENOUGH` and the shares). In scripts whose characters count as words,
both kinds have more words (see `STRETCH`).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nemo_upcycle.data.passages import Hit
from nemo_upcycle.data.word_hashes import (
    LETTERS,
    SYLLABLES,
    HashFilter,
    WordBlock,
    look_up,
    normalise,
    origin,
    word_blocks,
)
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import whole_file


if TYPE_CHECKING:
    from nemo_upcycle.data.suites.items import Item

WORDS = 13
SHORT_WORDS = 8
SHORTEST = 6
BOILERPLATE = 10
#: Short n-grams of an item form a group if the distance between neighbours is at most the length of the item. A group
#: is a hit if two conditions hold. First, the group covers more words than one n-gram. Second, the group covers at
#: least this number of words, or at least a share of the words of the item's longest rendering. `SHARE_OF_ONE` applies
#: if the n-grams of the group form one passage, `SHARE_OF_SEVERAL` if they form several passages. The values were
#: measured by `benchmarks/decontaminate.py`.
ENOUGH = 20
SHARE_OF_ONE, SHARE_OF_SEVERAL = 0.3, 0.2
#: Number of characters that count as one English word. First entry: Han, kana and Hangul. Second entry: Thai, Lao,
#: Tibetan, Burmese and Khmer.
STRETCH = {SYLLABLES: 2, LETTERS: 3}
#: Minimum number of words of two or more letters in a short n-gram, because rows of digits are no evidence of an item.
_LETTERED = 2

_FORMAT = 2


class _Match(NamedTuple):
    """An n-gram found in a text: first word, one past the last word, first byte, one past the last, table entry."""

    first: int
    last: int
    start: int
    stop: int
    entry: int
    is_long: bool


class _Table(NamedTuple):
    """Sorted hashes of n-grams; `places[bounds[i]:bounds[i + 1]]` are the numbers of the items with n-gram i."""

    hashes: np.ndarray
    bounds: np.ndarray
    places: np.ndarray

    def items(self, entry: int) -> list[int]:
        """Return the numbers of the items that contain an n-gram."""
        return list(self.places[self.bounds[entry] : self.bounds[entry + 1]].tolist())


class NgramIndex:
    """The n-grams of evaluation items, and the items that contain each n-gram.

    Attributes:
        arrays: arrays that `save` writes.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self._prefix = int(arrays["settings"][4])
        self._tables = {
            is_long: _Table(*(arrays[f"{name}_{field}"] for field in _Table._fields))
            for is_long, name in ((True, "long"), (False, "short"))
            if len(arrays[f"{name}_hashes"])
        }
        self._longest = int(np.bitwise_or.reduce(arrays["prefix_sizes"], initial=2)).bit_length() - 1
        self._begins = HashFilter(arrays["prefixes"])

    @classmethod
    def build(
        cls,
        items: Iterable[Item],
        words: int = WORDS,
        shortest: int = SHORTEST,
        boilerplate: int = BOILERPLATE,
        short_words: int = 0,
    ) -> NgramIndex:
        """Index the n-grams of items; a rendering with fewer words than an n-gram becomes one shorter n-gram.

        Args:
            items: items; they are numbered set by set, in the order given.
            words: words in a long n-gram, up to 21.
            shortest: minimum number of words of a rendering that is indexed.
            boilerplate: maximum number of items of one set that may contain an n-gram. More common n-grams and n-grams
                of digits only are ignored.
            short_words: words in a short n-gram; only several short n-grams together are a hit. 0 means that there are
                no short n-grams.

        Example:
            >>> index = NgramIndex.build([Item("quiz", "1", ("Which of the two came first, and why?",))])
            >>> index.find("Asked which of the two came first and why, he smiled.")
            [Hit(start=6, stop=41, size=8, items=(0,))]
        """
        items = list(items)
        names = list(dict.fromkeys(item.name for item in items))
        items.sort(key=lambda item: names.index(item.name))  # a stable sort: keeps the order in a set
        name_of = np.array([names.index(item.name) for item in items], np.int32)
        texts = [(number, text) for number, item in enumerate(items) for text in map(normalise, item.renderings)]
        measured = [(number, text, _length(text), stretch_of(text)) for number, text in dict.fromkeys(texts)]
        lengths = np.zeros(len(items), np.int64)
        for number, _, length, _ in measured:
            lengths[number] = max(lengths[number], length)
        long: dict[int, list[tuple[int, bytes]]] = {}
        short: dict[int, list[tuple[int, bytes]]] = {}
        for number, text, length, stretch in measured:
            if length >= shortest * stretch:
                long.setdefault(min(length, words * stretch), []).append((number, text))
            if short_words and length > short_words * stretch:
                short.setdefault(short_words * stretch, []).append((number, text))

        prefix = min(words, shortest, short_words or words)
        arrays: dict[str, np.ndarray] = {}
        begins = []
        for name, groups, lettered in (("long", long, 0), ("short", short, _LETTERED)):
            grams = _grams_of(groups, prefix, lettered)
            kept, arrays[f"{name}_counts"] = _without_boilerplate(grams, name_of, len(names), boilerplate)
            first = np.flatnonzero(_changes(kept["hash"]))
            arrays[f"{name}_hashes"] = kept["hash"][first]
            arrays[f"{name}_bounds"] = np.append(first, len(kept)).astype(np.int64)
            arrays[f"{name}_places"] = kept["owner"]
            begins.append(kept[first])
        prefixes = np.concatenate([kept["prefix"] for kept in begins])
        sizes = np.uint64(1) << np.concatenate([kept["size"] for kept in begins]).astype(np.uint64)
        order = np.argsort(prefixes, kind="stable")
        prefixes, sizes = prefixes[order], sizes[order]
        first = np.flatnonzero(_changes(prefixes))
        return cls(
            {
                "settings": np.array([_FORMAT, words, shortest, boilerplate, prefix], np.int64),
                "names": np.array(names, np.str_),
                "name_of": name_of,
                "ids": np.array([item.id for item in items], np.str_),
                "lengths": lengths,
                "prefixes": prefixes[first],
                "prefix_sizes": np.bitwise_or.reduceat(sizes, first) if len(first) else sizes,
                **arrays,
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
            UpcycleError: the file is missing, damaged, or has another version.
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
                f"N-gram index {path}",
                kind="state",
                got=f"is damaged, or not of version {_FORMAT} ({error})",
                fix="delete it and prepare the data again",
            ) from None

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """Map each evaluation set to the counts of its items and long n-grams.

        The counts are `items`, `ngrams`, `ignored` (n-grams in too many items), `too_short` (items that give no
        n-gram) and `only_boilerplate` (items whose n-grams are all ignored).
        """
        columns = ("items", "ngrams", "ignored", "too_short", "only_boilerplate")
        names, counts = self.arrays["names"].tolist(), self.arrays["long_counts"].tolist()
        return {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, counts, strict=True)}

    @property
    def short_summary(self) -> dict[str, dict[str, int]]:
        """Map each evaluation set to its counts in `summary`, with `ngrams` and `ignored` of the short n-grams."""
        rows = zip(self.summary.items(), self.arrays["short_counts"].tolist(), strict=True)
        return {name: counts | {"ngrams": row[1], "ignored": row[2]} for (name, counts), row in rows}

    def item(self, number: int) -> tuple[str, str]:
        """Return the evaluation set and the id of an item."""
        return str(self.arrays["names"][self.arrays["name_of"][number]]), str(self.arrays["ids"][number])

    def find(self, text: str) -> list[Hit]:
        """Return the passages that contain items, in order; passages that share words are merged.

        Args:
            text: any text; its size is limited by memory only.
        """
        return self.search(text)[0]

    def search(self, text: str) -> tuple[list[Hit], list[Hit]]:
        """Return the hits of `find`, and all passages that share n-grams with items, short n-grams included."""
        matches = sorted(set(self._matches(normalise(text))))
        if not matches:
            return [], []
        places = origin(text)
        passages = [(match, self._tables[match.is_long].items(match.entry)) for match in matches]
        hits = [(match, numbers) for match, numbers in passages if match.is_long]
        hits += self._clusters([(match, numbers) for match, numbers in passages if not match.is_long])
        return _merged(sorted(hits), places), _merged(passages, places)

    def _matches(self, normalised: bytes) -> Iterator[_Match]:
        for block in word_blocks(normalised, self._longest - 1):
            hashes = block.grams(self._prefix)
            at = self._begins.may_hold(hashes)
            entries, same = look_up(self.arrays["prefixes"], hashes[at])
            at, sizes = at[same], self.arrays["prefix_sizes"][entries[same]]
            wanted = int(np.bitwise_or.reduce(sizes, initial=0))
            for size in range(wanted.bit_length()):
                if wanted >> size & 1:
                    words = at[(sizes >> np.uint64(size) & np.uint64(1)).astype(bool)]
                    yield from self._of_size(block, size, words[words + size < len(block.sums)])

    def _of_size(self, block: WordBlock, size: int, words: np.ndarray) -> Iterator[_Match]:
        hashes = block.grams(size, words)
        for is_long, table in self._tables.items():
            entries, same = look_up(table.hashes, hashes)
            for word, entry in zip(words[same].tolist(), entries[same].tolist(), strict=True):
                start, stop = int(block.starts[word]), int(block.stops[word + size - 1])
                yield _Match(block.first + word, block.first + word + size, start, stop, entry, is_long)

    def _clusters(self, matches: list[tuple[_Match, list[int]]]) -> Iterator[tuple[_Match, list[int]]]:
        """Yield, for each item, the short n-grams that are close together and form a hit."""
        by_item: dict[int, list[_Match]] = {}
        for match, numbers in matches:
            for number in numbers:
                by_item.setdefault(number, []).append(match)
        for number, found in by_item.items():
            length = int(self.arrays["lengths"][number])
            clusters: list[list[_Match]] = []
            for match in found:
                if clusters and match.first - clusters[-1][-1].last <= length:
                    clusters[-1].append(match)
                else:
                    clusters.append([match])
            for cluster in clusters:
                if _is_enough(cluster, length):
                    yield from ((match, [number]) for match in cluster)


def _is_enough(cluster: list[_Match], length: int) -> bool:
    """Return whether short n-grams of an item of `length` words are a hit; equal n-grams count once."""
    covered = passages = last = 0
    seen: set[int] = set()
    for match in cluster:
        if match.entry not in seen:
            seen.add(match.entry)
            passages += match.first >= last
            covered += match.last - max(match.first, last)
            last = match.last
    stretch = (cluster[0].last - cluster[0].first) // SHORT_WORDS
    share = SHARE_OF_ONE if passages == 1 else SHARE_OF_SEVERAL
    return covered >= max((SHORT_WORDS + 1) * stretch, min(share * length, ENOUGH * stretch))


def _merged(passages: list[tuple[_Match, list[int]]], places: np.ndarray) -> list[Hit]:
    """Return the passages in order, and merge passages that share words."""
    merged: list[tuple[int, int, int, int, set[int]]] = []
    for match, numbers in passages:
        if merged and match.first < merged[-1][1]:
            first, last, start, stop, before = merged[-1]
            merged[-1] = (first, max(match.last, last), start, max(match.stop, stop), before.union(numbers))
        else:
            merged.append((match.first, match.last, match.start, match.stop, set(numbers)))
    return [
        Hit(int(places[start]), int(places[stop - 1]) + 1, last - first, tuple(sorted(numbers)))
        for first, last, start, stop, numbers in merged
    ]


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Return which rows differ from the row before; the first row always counts as different."""
    changed = np.zeros(len(columns[0]), bool)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


def stretch_of(text: bytes) -> int:
    """Return how many words of a normalised text stand for one English word."""
    if text.isascii():
        return 1
    decoded = text.decode()
    counts = {stretch: len(re.findall(f"[{script}]", decoded)) for script, stretch in STRETCH.items()}
    stretch = max(counts, key=lambda stretch: counts[stretch])
    return stretch if 2 * counts[stretch] > _length(text) else 1


def _length(text: bytes) -> int:
    return len(text.replace(b"\0", b" ").split())


def _grams_of(groups: dict[int, list[tuple[int, bytes]]], prefix: int, lettered: int) -> np.ndarray:
    """Return the n-grams of texts, each with the hash of its first words.

    Args:
        groups: size of an n-gram -> pairs of an item's number and its text.
        prefix: number of words at the start of an n-gram by which a search finds it.
        lettered: minimum number of words with two or more letters in an n-gram; 0 accepts every n-gram that is not
            only digits.
    """
    kind = np.dtype([("hash", np.uint64), ("owner", np.int32), ("size", np.int32), ("prefix", np.uint64)])
    grams = [np.empty(0, kind)]
    for size, members in sorted(groups.items()):
        joined = b"\0".join(text for _, text in members)
        ends = np.cumsum([len(text) + 1 for _, text in members])
        numbers = np.array([number for number, _ in members], np.int32)
        for block in word_blocks(joined, size - 1):
            begin = np.searchsorted(ends, block.starts, side="right")
            at = np.arange(max(len(begin) + 1 - size, 0))
            at = at[begin[at] == begin[at + size - 1]]
            telling = np.append(0, np.cumsum(_letters_of(joined, block) >= (2 if lettered else 1)))
            at = at[telling[at + size] - telling[at] >= max(lettered, 1)]
            found = np.empty(len(at), kind)
            found["hash"], found["prefix"] = block.grams(size, at), block.grams(prefix, at)
            found["owner"], found["size"] = numbers[begin[at]], size
            grams.append(found)
    return np.concatenate(grams)


def _letters_of(normalised: bytes, block: WordBlock) -> np.ndarray:
    """Return how many bytes of each word are not digits."""
    start, stop = int(block.starts[:1].sum()), int(block.stops[-1:].sum())
    letters = np.append(0, np.cumsum(np.frombuffer(normalised, np.uint8)[start:stop] > ord("9")))
    return np.asarray(letters[block.stops - start] - letters[block.starts - start])


def _without_boilerplate(
    grams: np.ndarray, name_of: np.ndarray, names: int, boilerplate: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted n-grams that are not in too many items of a set, and the counts of `summary`."""
    order = np.lexsort((grams["owner"], grams["hash"]))
    once = _changes(grams["hash"][order], grams["owner"][order])
    grams = grams[order[once]]
    hashes, owners = np.ascontiguousarray(grams["hash"]), np.ascontiguousarray(grams["owner"])
    runs = np.flatnonzero(_changes(hashes, name_of[owners]))  # the rows of one n-gram and one set form a run
    sizes = np.diff(np.append(runs, len(grams)))
    ignored = np.isin(hashes, hashes[runs[sizes > boilerplate]])
    numbers = (
        every := np.arange(len(name_of)),
        owners[runs[~ignored[runs]]],
        owners[runs[ignored[runs]]],
        np.setdiff1d(every, owners),
        np.setdiff1d(owners, owners[~ignored]),
    )
    counts = [np.bincount(name_of[column], minlength=names) for column in numbers]
    return grams[~ignored], np.stack(counts, axis=1).astype(np.int64)
