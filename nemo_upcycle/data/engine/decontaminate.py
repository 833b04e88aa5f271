"""Take what evaluation items say out of the documents of training, and report looser matches in what is left."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline

from nemo_upcycle.data.contamination import Contamination
from nemo_upcycle.data.engine.ledger import LedgerStep
from nemo_upcycle.data.ngrams import Hit, NgramIndex, cut, removed_spans


#: What a cut leaves of a document is a document of its own if it has this many characters.
SHORTEST_PIECE = 200


class Decontaminate(LedgerStep):
    """Drops a training document that shares n-grams with an evaluation item, or cuts the passage out of it."""

    type, name = "filter", "n-grams of the evaluation items"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield clean documents; count what was taken out of them."""
        index = _index(Path(str(self.ledger.plan.ngram_index)))
        counts = self.ledger.contamination = Contamination(index)
        for document in data:
            hits = index.find(document.text) if document.metadata["split"] == "train" else []
            if not hits:
                yield document
                continue
            pieces = cut(document.text, hits) if self.ledger.task.on_hit == "cut" else []
            kept = [piece for piece in pieces if len(piece) >= SHORTEST_PIECE]
            spans = removed_spans(document.text, hits) if kept else [(0, len(document.text))]
            counts.add(document.id, document.metadata["where"], document.text, hits, spans)
            self._record(document, hits, kept, index)
            for number, text in enumerate(kept, 1):
                self.ledger.cut["pieces"] += 1
                yield Document(text=text, id=f"{document.id}#{number}", metadata=document.metadata)

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


class Report(LedgerStep):
    """Counts the shorter n-grams of evaluation items in the documents of training, and removes nothing.

    What the last step omits, beyond a source's `tokens`, is counted as well.
    """

    type, name = "report", "shorter n-grams of the evaluation items"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        index = _index(Path(str(self.ledger.plan.report_index)))
        report = self.ledger.report = Contamination(index)
        for document in data:
            if document.metadata["split"] == "train":
                report.add(document.id, document.metadata["where"], document.text, index.find(document.text))
            yield document


@lru_cache(maxsize=2)
def _index(path: Path) -> NgramIndex:
    return NgramIndex.load(path)
