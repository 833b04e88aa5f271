"""The steps that remove documents: filters, datatrove's exact deduplication, decontamination.

Among equal documents, the document in the first task is kept (`make_plan`). Passages of evaluation items are cut out
of training documents. Looser matches in the remaining text are only reported.
"""

from __future__ import annotations

import sys
import unicodedata
from abc import abstractmethod
from array import array
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig, ExactDedupSignature, get_sig_dtype
from xxhash import xxh64, xxh64_intdigest

from nemo_upcycle.data.contamination import Contamination
from nemo_upcycle.data.engine.ledger import Ledger, LedgerStep
from nemo_upcycle.data.engine.tasks import MAX_TASKS, EnginePlan
from nemo_upcycle.data.ngrams import NgramIndex
from nemo_upcycle.data.passages import Hit, cut, removed_spans
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json, whole_file, write_json


#: Minimum number of characters that the text on one side of a cut needs to become a document.
SHORTEST_PIECE = 200
#: Reason -> files in the plan's folder that hold the numbers of duplicate documents.
DUPLICATES = {
    "duplicate": "duplicates/found/*/{rank:05d}.c4_dup",
    "near duplicate": "duplicates/near/{rank:05d}.remove",
}


class RemoveDocuments(LedgerStep):
    """Removes the documents for which `reason` returns a reason."""

    type, name, step = "filter", "documents with a reason", ""

    @abstractmethod
    def reason(self, document: Document) -> str | None:
        """Return why a document is removed, or None to keep it."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents to keep."""
        for document in data:
            if reason := self.reason(document):
                self.ledger.removed_document(self.step, reason, document)
            else:
                yield document


class RemoveShort(RemoveDocuments):
    """Keeps documents that are long enough and in the bucket that the task asks for."""

    name, step = "length and bucket", "filter"

    def reason(self, document: Document) -> str | None:
        """See `RemoveDocuments.reason`."""
        length = len(document.text.strip())
        if length < max(1, self.ledger.plan.min_characters):
            return "too short" if length else "empty"
        wanted = self.ledger.task.options.get("bucket")
        if wanted and document.metadata["bucket"] not in ([wanted] if isinstance(wanted, str) else wanted):
            return "other bucket"
        return None


class RemoveListed(RemoveDocuments):
    """Removes the documents on the publisher's list of duplicates."""

    name, step = "listed duplicates", "deduplicate"

    def reason(self, document: Document) -> str | None:
        """See `RemoveDocuments.reason`."""
        return "listed" if document.metadata["listed"] else None


def compared_text(document: Document) -> str:
    """Return the text to compare, with composed characters (NFC); blanks and line ends in a row become one blank."""
    return " ".join(unicodedata.normalize("NFC", document.text).split())


def deduplication() -> ExactDedupConfig:
    """Return the configuration that all of datatrove's deduplication steps share."""
    return ExactDedupConfig(content_getter=compared_text)


def _numbered(data: DocumentsPipeline, digest: xxh64) -> DocumentsPipeline:
    """Assign a number to each document, add its text to a digest, and pass the document on."""
    for number, document in enumerate(data):
        document.metadata["number"] = number
        digest.update(xxh64_intdigest(document.text.encode()).to_bytes(8, sys.byteorder))
        yield document


class SignDocuments(ExactDedupSignature):
    """Numbers documents, and writes a 14-byte signature of each compared text and one digest of all documents.

    datatrove breaks ties by the document's number in its task, and then by chance. So each task has its own priority,
    and the earlier task wins.
    """

    def __init__(self, ledger: Ledger, folder: Path, finders: int) -> None:
        super().__init__(str(folder / "signatures"), deduplication(), finder_workers=finders)
        self.ledger, self.folder = ledger, folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        hashes, digest = array("Q"), xxh64()
        for document in _numbered(data, digest):
            hashes.append(self.hash_fc(compared_text(document)))
            yield document
        signatures = np.zeros(len(hashes), dtype=get_sig_dtype(self.config.hash_config))
        signatures["hash"] = np.frombuffer(hashes, dtype=np.uint64) if hashes else []
        signatures["priority"] = MAX_TASKS - rank
        signatures["doc"] = np.arange(len(hashes))
        self.save_hashes(rank, signatures)
        write_json(_digest_path(self.folder, rank), digest.hexdigest())


class RequireSameDocuments(LedgerStep):
    """Numbers documents, and checks that the first pass had the same documents, because removals use the numbers."""

    type, name = "check", "the documents of the first pass"

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        super().__init__(ledger)
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on.

        Raises:
            UpcycleError: the documents differ from the first pass.
        """
        digest = xxh64()
        yield from _numbered(data, digest)
        if digest.hexdigest() != read_json(_digest_path(self.folder, rank)):
            raise UpcycleError(
                f"The input of {self.ledger.task.source}",
                kind="changed",
                got=f"task {rank}",
                expected="the first pass over it",
                fix=f"delete {self.folder.parents[1]} and start again with files that nobody edits",
            )


class RemoveNumbered(RemoveDocuments):
    """Removes the documents whose numbers an earlier stage wrote.

    Args:
        ledger: record of the task.
        step: step under which the removals are recorded.
        files: reason -> files of document numbers in the plan's folder.
    """

    name = "documents that an earlier stage found"

    def __init__(self, ledger: Ledger, step: str, files: dict[str, str]) -> None:
        super().__init__(ledger)
        self.step, self.files = step, files

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents to keep."""
        self.reasons = numbered(self.ledger.plan, rank, self.files)
        yield from super().run(data, rank, world_size)

    def reason(self, document: Document) -> str | None:
        """See `RemoveDocuments.reason`."""
        return self.reasons.get(document.metadata["number"])


def numbered(plan: EnginePlan, rank: int, files: dict[str, str]) -> dict[int, str]:
    """Return the document numbers that were written for a task, each with its first reason."""
    reasons: dict[int, str] = {}
    for reason, pattern in files.items():
        for path in plan.folder.glob(pattern.format(rank=rank)):
            for number in np.fromfile(path, "<u4").tolist():
                reasons.setdefault(number, reason)
    return reasons


def write_numbers(path: Path, numbers: Any) -> None:
    """Write document numbers for `numbered`, without numpy's `tofile`, which does not report a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside:
        aside.write_bytes(np.array(numbers, "<u4").tobytes())


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays that a later stage loads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside, aside.open("wb") as handle:
        np.savez_compressed(handle, **arrays)


def _digest_path(folder: Path, rank: int) -> Path:
    return folder / "digests" / f"{rank:05d}.json"


class Decontaminate(LedgerStep):
    """Drops a training document that contains an evaluation item, or cuts the passage out of it.

    Short n-grams of items in the remaining text are counted but not removed. The counts include documents that the
    last step omits because their source has more tokens than its `tokens` setting allows.
    """

    type, name = "filter", "n-grams of the evaluation items"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield clean documents, and count the passages removed from them."""
        index = _index(Path(str(self.ledger.plan.ngram_index)))
        counts = self.ledger.contamination = Contamination(index)
        report = self.ledger.report = Contamination(index)
        for document in data:
            hits, passages = index.search(document.text) if document.metadata["split"] == "train" else ([], [])
            if not hits:
                report.add(document.id, document.metadata["where"], document.text, passages)
                yield document
                continue
            pieces = cut(document.text, hits) if self.ledger.task.on_hit == "cut" else []
            kept = [piece for piece in pieces if len(piece) >= SHORTEST_PIECE]
            spans = removed_spans(document.text, hits) if kept else [(0, len(document.text))]
            counts.add(document.id, document.metadata["where"], document.text, hits, spans)
            self._record(document, hits, kept, index)
            for number, text in enumerate(kept, 1):
                self.ledger.cut["pieces"] += 1
                identity = f"{document.id}#{number}"
                report.add(identity, document.metadata["where"], text, index.search(text)[1])
                yield Document(text=text, id=identity, metadata=document.metadata)

    def _record(self, document: Document, hits: list[Hit], kept: list[str], index: NgramIndex) -> None:
        names = sorted({index.item(number)[0] for hit in hits for number in hit.items})
        more: dict[str, Any] = {"sets": names, "passages": [[hit.start, hit.stop] for hit in hits]}
        if not kept:
            reason = "dropped" if self.ledger.task.on_hit == "drop" else "nothing left"
            self.ledger.removed_document("decontaminate", reason, document, **more)
            return
        lost_bytes = len(document.text.encode()) - sum(len(text.encode()) for text in kept)
        self.ledger.cut.update(documents=1, bytes=lost_bytes)
        self.ledger.note(
            "decontaminate", "cut", document.id, document.metadata["where"], lost_bytes, pieces=len(kept), **more
        )


@lru_cache(maxsize=1)
def _index(path: Path) -> NgramIndex:
    return NgramIndex.load(path)
