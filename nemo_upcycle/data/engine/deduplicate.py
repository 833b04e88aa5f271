"""Of equal documents keep that of the first task (`data/tasks.py`): datatrove's exact deduplication, two passes."""

from __future__ import annotations

import sys
from array import array
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig, ExactDedupSignature, get_sig_dtype
from xxhash import xxh64, xxh64_intdigest

from nemo_upcycle.data.engine.ledger import Ledger, LedgerStep
from nemo_upcycle.data.engine.plan import MAX_TASKS
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json, write_json


def stripped_text(document: Document) -> str:
    """Return what is compared."""
    return document.text.strip()


def deduplication() -> ExactDedupConfig:
    """Return the configuration that all of datatrove's steps share."""
    return ExactDedupConfig(content_getter=stripped_text)


class SignDocuments(ExactDedupSignature):
    """Writes the hash of every document, 14 bytes each, and a digest of them all.

    datatrove breaks ties by the number of the document in its task, and then by chance. So every task has a priority
    of its own: the earlier one wins.
    """

    def __init__(self, ledger: Ledger, folder: Path, finders: int) -> None:
        super().__init__(str(folder / "signatures"), deduplication(), finder_workers=finders)
        self.ledger, self.folder = ledger, folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Read the documents of a task and write their signatures."""
        hashes = array("Q", (self.hash_fc(stripped_text(document)) for document in data))
        signatures = np.zeros(len(hashes), dtype=get_sig_dtype(self.config.hash_config))
        signatures["hash"] = np.frombuffer(hashes, dtype=np.uint64) if hashes else []
        signatures["priority"] = MAX_TASKS - rank
        signatures["doc"] = np.arange(len(hashes))
        self.save_hashes(rank, signatures)
        write_json(_digest_path(self.folder, rank), xxh64(hashes.tobytes()).hexdigest())


class RequireSameDocuments(LedgerStep):
    """Checks that the second pass reads what the first one read: duplicates are known by their numbers."""

    type, name = "check", "the documents of the first pass"

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        super().__init__(ledger)
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on.

        Raises:
            UpcycleError: the documents are others.
        """
        digest = xxh64()
        for document in data:
            digest.update(xxh64_intdigest(stripped_text(document).encode()).to_bytes(8, sys.byteorder))
            yield document
        if digest.hexdigest() != read_json(_digest_path(self.folder, rank)):
            raise UpcycleError(
                f"input of {self.ledger.task.source} (task {rank})",
                got="other documents than in the first pass over it",
                expected="files that nobody changes",
                fix=f"delete {self.folder.parents[1]} and start again",
            )


def _digest_path(folder: Path, rank: int) -> Path:
    return folder / "digests" / f"{rank:05d}.json"
