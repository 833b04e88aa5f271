"""Choose which documents to take if a source has more tokens than its `tokens` setting; a hash of the id decides.

First, the tokens that remain after all removals are counted. So a source with enough tokens gives as many tokens as
its `tokens` setting asks for. The order depends only on the ids and the seed.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from datatrove.data import DocumentsPipeline
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from nemo_upcycle.data.engine.clean import write_arrays, write_numbers
from nemo_upcycle.data.engine.ledger import Ledger, LedgerStep
from nemo_upcycle.data.engine.tokenise import batches, load_encode


#: Reason -> files in the plan's folder that hold the numbers of the documents that are not taken.
BEYOND = {"max_tokens": "quotas/{rank:05d}.remove"}


class CountTokens(LedgerStep):
    """Writes each training document's number of tokens and place in the order, if the task's source has a quota."""

    type, name = "count", "tokens that are left"

    def __init__(self, ledger: Ledger, library: str) -> None:
        super().__init__(ledger)
        self.library = library

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Read the documents of a task, or none if the task has no quota."""
        plan = self.ledger.plan
        numbers, places, sizes = array("I"), array("Q"), array("q")
        if self.ledger.task.max_tokens:
            encode = load_encode(plan, self.library)
            for batch in batches(document for document in data if document.metadata["split"] == "train"):
                numbers.extend(document.metadata["number"] for document in batch)
                ids = (f"{plan.seed}:{document.id}".encode(errors="surrogatepass") for document in batch)
                places.extend(map(xxh64_intdigest, ids))
                _, offsets = encode([document.text for document in batch])
                sizes.frombytes((np.diff(offsets) + 1).tobytes())
        # Decontamination may cut a document into pieces. All pieces are taken together, at the place of the first
        # piece.
        documents, first = np.unique(np.array(numbers, np.uint32), return_index=True)
        tokens = np.add.reduceat(np.array(sizes, np.int64), first) if len(first) else np.empty(0, np.int64)
        path = plan.path("quotas", rank, "npz")
        write_arrays(path, numbers=documents, places=np.array(places, np.uint64)[first], tokens=tokens)


class TakeDocuments(LedgerStep):
    """Writes which documents exceed the maximum number of tokens of their source."""

    type, name = "quota", "documents beyond the tokens of their source"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Look at all tasks, source by source."""
        plan = self.ledger.plan
        quotas = {task.source: task.max_tokens for task in plan.tasks if task.max_tokens}
        for source, most in quotas.items():
            ranks = [n for n, task in enumerate(plan.tasks) if task.source == source and task.max_tokens]
            counted = [dict(np.load(plan.path("quotas", task, "npz"))) for task in ranks]
            places, tokens = (np.concatenate([of_task[name] for of_task in counted]) for name in ("places", "tokens"))
            beyond = np.ones(len(tokens), bool)
            beyond[taken(places, tokens, most)] = False
            ends = np.cumsum([len(of_task["numbers"]) for of_task in counted])
            for task, of_task, its in zip(ranks, counted, np.split(beyond, ends[:-1]), strict=True):
                write_numbers(plan.folder / BEYOND["max_tokens"].format(rank=task), of_task["numbers"][its])


def taken(places: NDArray[np.uint64], tokens: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Go through the documents in the order of their places, and return the indices of all documents that fit.

    Example:
        >>> taken(np.array([9, 1, 5, 7], np.uint64), np.array([2, 4, 8, 1]), 7).tolist()
        [0, 1, 3]
    """
    order, kept = np.argsort(places, kind="stable"), [np.empty(0, np.int64)]
    while len(order := order[tokens[order] <= most]):
        fitting = int(np.searchsorted(np.cumsum(tokens[order]), most, side="right"))
        kept.append(order[:fitting])
        most -= int(tokens[kept[-1]].sum())
        order = order[fitting:]
    return np.sort(np.concatenate(kept))
