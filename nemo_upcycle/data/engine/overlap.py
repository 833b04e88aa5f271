"""Find text that is in a held-out and in a training document, and remove one of the two documents.

After deduplication, documents are searched for the short n-grams that decontamination uses. As in decontamination, the
overlap is the number of words that the n-grams cover together. In a copy with one word in ten changed, most words
still match, but few n-grams match.

A training document with most of its words in held-out text is a copy or a part of this text, and is removed. Then a
held-out document with most of its words in the remaining training text is removed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import DocumentsPipeline

from nemo_upcycle.data.engine.clean import DUPLICATES, numbered, write_arrays, write_numbers
from nemo_upcycle.data.engine.ledger import LedgerStep
from nemo_upcycle.data.engine.tasks import EnginePlan
from nemo_upcycle.data.finished import HELDOUT_OVERLAP
from nemo_upcycle.data.ngrams import SHORT_WORDS, stretch_of
from nemo_upcycle.data.word_hashes import HashFilter, grams_of, joined, look_up, normalise
from nemo_upcycle.utils.files import write_json


#: Maximum number of held-out n-grams to search for. If there are more, only every second, third, ... n-gram is used,
#: chosen by its hash.
MOST_NGRAMS = 1 << 23
#: Reason -> files in the plan's folder that hold the numbers of the removed documents.
REMOVED = {
    "mostly in held-out text": "overlap/train/{rank:05d}.remove",
    "mostly in training text": "overlap/heldout/{rank:05d}.remove",
}


def _grams(text: str) -> tuple[int, Iterator[np.ndarray]]:
    """Return the number of words in an n-gram of a text's script, and the hashes of the text's n-grams in blocks."""
    words = normalise(text)
    size = SHORT_WORDS * stretch_of(words)
    return size, grams_of(words, size)


def _covered(starts: np.ndarray, size: int | np.ndarray) -> np.ndarray:
    """Return how many words each n-gram covers before the next n-gram starts; `starts` are ascending positions."""
    return np.minimum(np.diff(starts, append=starts[-1:] + np.max(size, initial=0)), size)


def _seen(every: int, size: int | np.ndarray) -> Any:
    """Return the share of a copy's words that n-grams cover if only one n-gram in `every` is searched for."""
    return 1 - (1 - 1 / every) ** size


@dataclasses.dataclass(frozen=True)
class _Documents:
    """The held-out documents of a task, and their n-grams.

    For each document, `spans` is the number of words in an n-gram, and `sizes` is the number of n-grams. `hashes` has
    the n-grams of all documents.
    """

    numbers: np.ndarray
    splits: np.ndarray
    spans: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray

    @classmethod
    def load(cls, plan: EnginePlan, rank: int) -> _Documents:
        """Read the documents that remain after deduplication."""
        with np.load(plan.path("overlap/ngrams", rank, "npz")) as file:
            documents = cls(**file)
        return documents.where(~np.isin(documents.numbers, list(numbered(plan, rank, DUPLICATES))))

    def where(self, kept: np.ndarray) -> _Documents:
        """Return the documents that a mask selects."""
        hashes = self.hashes[np.repeat(kept, self.sizes)]
        return _Documents(self.numbers[kept], self.splits[kept], self.spans[kept], self.sizes[kept], hashes)

    @property
    def words(self) -> np.ndarray:
        """Number of words of every document; 0 if a document is shorter than an n-gram."""
        return np.where(self.sizes, self.sizes + self.spans - 1, 0)

    def covered(self, chosen: np.ndarray) -> np.ndarray:
        """Return, for every document, the number of words that the chosen n-grams cover."""
        more = np.cumsum(self.spans - 1) - (self.spans - 1)  # words of earlier documents that begin no n-gram
        starts = np.flatnonzero(chosen)
        counts = np.zeros(len(chosen), np.int64)
        words = starts + np.repeat(more, self.sizes)[starts]
        counts[starts] = _covered(words, np.repeat(self.spans, self.sizes)[starts])
        ends = np.cumsum(self.sizes)
        running = np.append(0, np.cumsum(counts))
        return running[ends] - running[ends - self.sizes]


class WriteHeldout(LedgerStep):
    """Writes the n-grams of the held-out documents of a task."""

    type, name = "overlap", "n-grams of held-out documents"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        numbers, splits, spans, hashes = [], [], [], []
        for document in data:
            if document.metadata["split"] != "train":
                numbers.append(document.metadata["number"])
                splits.append(document.metadata["split"])
                size, grams = _grams(document.text)
                spans.append(size)
                hashes.append(joined(grams))
            yield document
        documents = _Documents(
            numbers=np.array(numbers, np.uint32),
            splits=np.array(splits, np.str_),
            spans=np.array(spans, np.int64),
            sizes=np.array([len(one) for one in hashes], np.int64),
            hashes=joined(hashes),
        )
        write_arrays(self.ledger.plan.path("overlap/ngrams", rank, "npz"), **dataclasses.asdict(documents))


def _chosen(hashes: np.ndarray, every: int) -> np.ndarray:
    """Return which n-grams to search for."""
    return hashes % np.uint64(every) == 0


def _load_index(folder: Path) -> tuple[np.ndarray, int]:
    """Return the sorted n-grams to search for, and how many held-out n-grams each of them stands for."""
    with np.load(_index_path(folder)) as file:
        return file["hashes"], int(file["every"])


def _index_path(folder: Path) -> Path:
    return folder / "overlap" / "index.npz"


class IndexHeldout(LedgerStep):
    """Joins the n-grams of the held-out documents of all tasks."""

    type, name = "overlap", "index of held-out n-grams"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the index."""
        plan = self.ledger.plan
        total = sum(len(_Documents.load(plan, task).hashes) for task in range(len(plan.tasks)))
        every, hashes = max(1, -(-total // MOST_NGRAMS)), []
        for task in range(len(plan.tasks)):
            of_task = _Documents.load(plan, task).hashes
            hashes.append(of_task[_chosen(of_task, every)])
        write_arrays(_index_path(plan.folder), hashes=np.unique(joined(hashes)), every=np.array(every))


@lru_cache(maxsize=1)
def _searched(folder: Path) -> tuple[np.ndarray, int, HashFilter]:
    index, every = _load_index(folder)
    return index, every, HashFilter(index)


class CompareTraining(LedgerStep):
    """Writes which training documents are mostly in held-out text, and which held-out n-grams are in training text."""

    type, name = "overlap", "held-out n-grams in training text"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Read the documents of a task."""
        plan = self.ledger.plan
        index, every, may_hold = _searched(plan.folder)
        removed = []
        before, after = np.zeros(len(index), bool), np.zeros(len(index), bool)
        for document in data if self.ledger.task.split in (None, "train") else ():
            if document.metadata["split"] != "train":
                continue
            total, places, starts = 0, [np.empty(0, np.int64)], [np.empty(0, np.int64)]
            size, grams = _grams(document.text)
            for hashes in grams:
                at = may_hold.may_hold(hashes)
                found, same = look_up(index, hashes[at])
                places.append(found[same])
                starts.append(total + at[same])
                total += len(hashes)
            shared = np.concatenate(places)
            before[shared] = True
            covered = _covered(np.concatenate(starts), size).sum()
            if covered > _most(plan) * (total + size - 1) * _seen(every, size):
                removed.append(document.metadata["number"])
            else:
                after[shared] = True
        write_numbers(plan.folder / REMOVED["mostly in held-out text"].format(rank=rank), removed)
        write_arrays(plan.path("overlap/found", rank, "npz"), before=np.packbits(before), after=np.packbits(after))


def _most(plan: EnginePlan) -> float:
    return float(plan.heldout_overlap or 0)


class JudgeHeldout(LedgerStep):
    """Writes which held-out documents are mostly in kept training text, and the overlap before and after removals."""

    type, name = "overlap", "held-out documents in training text"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Look at all tasks."""
        plan = self.ledger.plan
        index, every = _load_index(plan.folder)
        found = {kind: _found(plan, kind, len(index)) for kind in ("before", "after")}
        rows: dict[tuple[str, str], Counter[str]] = {}
        for number, task in enumerate(plan.tasks):
            documents = _Documents.load(plan, number)
            chosen = _chosen(documents.hashes, every)
            places = look_up(index, documents.hashes)[0]
            words, seen = documents.words, _seen(every, documents.spans)
            before, after = (
                np.minimum(np.rint(documents.covered(chosen & bits[places]) / seen).astype(np.int64), words)
                for bits in found.values()
            )
            is_removed = after > _most(plan) * words
            path = plan.folder / REMOVED["mostly in training text"].format(rank=number)
            write_numbers(path, documents.numbers[is_removed])
            counts = {
                "documents": np.ones_like(words),
                "above": before > _most(plan) * words,
                "removed": is_removed,
                "words": words,
                "shared": before,
                "words_after": words * ~is_removed,
                "shared_after": after * ~is_removed,
            }
            for split in np.unique(documents.splits).tolist():
                of_split = documents.splits == split
                sums = {name: int(count[of_split].sum()) for name, count in counts.items()}
                rows.setdefault((task.source, split), Counter()).update(sums)
        written = [{"source": source, "split": split, **sums} for (source, split), sums in rows.items()]
        about = {"words": SHORT_WORDS, "unit": f"words (in rows of {SHORT_WORDS} or more)", "every": every}
        write_json(plan.folder / HELDOUT_OVERLAP, about | {"rows": written})


def _found(plan: EnginePlan, kind: str, size: int) -> np.ndarray:
    """Return which n-grams of the index appear in the training text of any task."""
    bits = np.zeros(-(-size // 8), np.uint8)
    for task in range(len(plan.tasks)):
        with np.load(plan.path("overlap/found", task, "npz")) as file:
            bits |= file[kind]
    return np.unpackbits(bits, count=size).astype(bool)
