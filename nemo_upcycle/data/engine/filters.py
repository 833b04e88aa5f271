"""Remove documents that are empty, too short, of another bucket, or in a list of duplicates."""

from __future__ import annotations

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from nemo_upcycle.data.engine.ledger import Ledger, RemovedWriter


class FilterDocuments(BaseFilter):
    """Keeps what is long enough and of the bucket that the task asks for."""

    name = "length and bucket"

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(RemovedWriter(ledger, "filter"))
        self.ledger = ledger

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return whether to keep a document, or why not."""
        length = len(doc.text.strip())
        if length == 0:
            return False, "empty"
        if length < self.ledger.plan.min_characters:
            return False, "too short"
        wanted = self.ledger.task.options.get("bucket")
        if wanted and doc.metadata["bucket"] not in ([wanted] if isinstance(wanted, str) else wanted):
            return False, "other bucket"
        return True


class FilterListed(BaseFilter):
    """Removes what the publisher's list of duplicates names."""

    name = "listed duplicates"

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(RemovedWriter(ledger, "deduplicate"))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return whether to keep a document, or why not."""
        return (False, "listed") if doc.metadata["listed"] else True
