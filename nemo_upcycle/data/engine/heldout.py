"""Held-out text that stands in training text as well: one of the two documents goes.

Looked for are the n-grams of decontamination, in what deduplication leaves. A training document that has most of its
n-grams in held-out text is removed: it is a copy, or a part. What is left of training text is compared with each
held-out document: one that has most of its n-grams there is removed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import DocumentsPipeline

from nemo_upcycle.data.engine.clean import DUPLICATES, numbered, write_numbers
from nemo_upcycle.data.engine.ledger import LedgerStep
from nemo_upcycle.data.engine.plan import Plan
from nemo_upcycle.data.finished import HELDOUT_OVERLAP
from nemo_upcycle.data.ngrams import WORDS
from nemo_upcycle.data.word_hashes import HashFilter, look_up, normalise, word_blocks
from nemo_upcycle.utils.files import whole_file, write_json


#: Above so many n-grams of held-out text only every second, third, ... is looked for, chosen by its hash.
MOST_NGRAMS = 1 << 23
#: Files of the numbers of the documents that go, in the folder of the plan, by reason.
REMOVED = {
    "mostly in held-out text": "overlap/train/{rank:05d}.remove",
    "mostly in training text": "overlap/heldout/{rank:05d}.remove",
}


def _grams(text: str) -> Iterator[np.ndarray]:
    """Yield the hashes of all n-grams of a text, block by block."""
    for block in word_blocks(normalise(text), WORDS - 1):
        yield block.grams(WORDS)


def _joined(hashes: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint64), *hashes])


@dataclasses.dataclass(frozen=True)
class _Documents:
    """The held-out documents of a task: their numbers, splits, numbers of n-grams, and the hashes of all these.

    An n-gram counts once in a document.
    """

    numbers: np.ndarray
    splits: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray

    @classmethod
    def load(cls, plan: Plan, rank: int) -> _Documents:
        """Read those that deduplication leaves."""
        with np.load(plan.path("overlap/ngrams", rank, "npz")) as file:
            documents = cls(**file)
        return documents.where(~np.isin(documents.numbers, list(numbered(plan, rank, DUPLICATES))))

    def where(self, kept: np.ndarray) -> _Documents:
        """Return some of the documents."""
        hashes = self.hashes[np.repeat(kept, self.sizes)]
        return _Documents(self.numbers[kept], self.splits[kept], self.sizes[kept], hashes)

    def sums(self, of_grams: np.ndarray) -> np.ndarray:
        """Return the sums of a value of every n-gram, document by document."""
        ends = np.cumsum(self.sizes)
        running = np.append(0, np.cumsum(of_grams, dtype=np.int64))
        return running[ends] - running[ends - self.sizes]


class WriteHeldout(LedgerStep):
    """Writes the n-grams of the held-out documents of a task."""

    type, name = "overlap", "n-grams of held-out documents"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        numbers, splits, hashes = [], [], []
        for document in data:
            if document.metadata["split"] != "train":
                numbers.append(document.metadata["number"])
                splits.append(document.metadata["split"])
                hashes.append(np.unique(_joined(_grams(document.text))))
            yield document
        sizes = np.array([len(one) for one in hashes], np.int64)
        documents = _Documents(np.array(numbers, np.uint32), np.array(splits, np.str_), sizes, _joined(hashes))
        _save(self.ledger.plan.path("overlap/ngrams", rank, "npz"), **dataclasses.asdict(documents))


def _save(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside, aside.open("wb") as handle:
        np.savez_compressed(handle, **arrays)


def _chosen(hashes: np.ndarray, every: int) -> np.ndarray:
    """Return which n-grams are looked for."""
    return hashes % np.uint64(every) == 0


def _load_index(folder: Path) -> tuple[np.ndarray, int]:
    """Return the sorted n-grams that are looked for, and of how many one is."""
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
        _save(_index_path(plan.folder), hashes=np.unique(_joined(hashes)), every=np.array(every))


@lru_cache(maxsize=1)
def _searched(folder: Path) -> tuple[np.ndarray, int, HashFilter]:
    index, every = _load_index(folder)
    return index, every, HashFilter(index)


class CompareTraining(LedgerStep):
    """Writes which training documents stand in held-out text, and which held-out n-grams stand in training text."""

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
            total, places = 0, [np.empty(0, np.int64)]
            for hashes in _grams(document.text):
                total += len(hashes) if every == 1 else int(_chosen(hashes, every).sum())
                found, same = look_up(index, hashes[may_hold.may_hold(hashes)])
                places.append(found[same])
            shared = np.concatenate(places)
            before[shared] = True
            if len(shared) > _most(plan) * total:
                removed.append(document.metadata["number"])
            else:
                after[shared] = True
        write_numbers(plan.folder / REMOVED["mostly in held-out text"].format(rank=rank), removed)
        _save(plan.path("overlap/found", rank, "npz"), before=np.packbits(before), after=np.packbits(after))


def _most(plan: Plan) -> float:
    return float(plan.heldout_overlap or 0)


class JudgeHeldout(LedgerStep):
    """Writes which held-out documents stand in what is left of training text, and the shares before and after."""

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
            ngrams, before, after = (
                documents.sums(of_grams) for of_grams in (chosen, *(chosen & bits[places] for bits in found.values()))
            )
            is_removed = after > _most(plan) * ngrams
            path = plan.folder / REMOVED["mostly in training text"].format(rank=number)
            write_numbers(path, documents.numbers[is_removed])
            counts = {
                "documents": np.ones_like(ngrams),
                "above": before > _most(plan) * ngrams,
                "removed": is_removed,
                "ngrams": ngrams,
                "shared": before,
                "ngrams_after": ngrams * ~is_removed,
                "shared_after": after * ~is_removed,
            }
            for split in np.unique(documents.splits).tolist():
                of_split = documents.splits == split
                sums = {name: int(count[of_split].sum()) for name, count in counts.items()}
                rows.setdefault((task.source, split), Counter()).update(sums)
        written = [{"source": source, "split": split, **sums} for (source, split), sums in rows.items()]
        write_json(plan.folder / HELDOUT_OVERLAP, {"words": WORDS, "every": every, "rows": written})


def _found(plan: Plan, kind: str, size: int) -> np.ndarray:
    """Return which n-grams of the index stand in the training text of any task."""
    bits = np.zeros(-(-size // 8), np.uint8)
    for task in range(len(plan.tasks)):
        with np.load(plan.path("overlap/found", task, "npz")) as file:
            bits |= file[kind]
    return np.unpackbits(bits, count=size).astype(bool)
