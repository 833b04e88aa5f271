"""The first step: read documents, and count unreadable ones with their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from xxhash import xxh3_128

from nemo_upcycle.data.engine.ledger import LedgerStep
from nemo_upcycle.data.engine.lines import NOT_THERE, open_input, size_of
from nemo_upcycle.data.engine.records import identity_of, own_identity, records_of, split_of, text_of, texts_there
from nemo_upcycle.data.readers import FORMATS, NO_FIELD


#: Maximum number of other fields to remember from records that lack the text field.
_MOST_FIELDS = 100


class ReadDocuments(LedgerStep):
    """Reads the files of a task. datatrove's own readers lose everything after a damaged line."""

    type, name = "reader", "files of the plan"

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of every file of the task."""
        task = self.ledger.task
        options = {**FORMATS[task.reader].defaults, **task.options}
        for file in task.files:
            name, before = self._name(file), self.ledger.bytes_in
            listed = self._listed_duplicates(options.get("duplicates", {}).get(file))
            try:
                stored = size_of(file)
                self.ledger.files[file] = {"bytes": stored, **_modified(file), "whole": False}
                start, stop, _ = options.get("part", (0, stored, 1))
                texts = self.ledger.texts[file] = xxh3_128()
                for place, identity, size_bytes, record in records_of(file, name, task.reader, options):
                    is_whole = size_bytes is None and isinstance(record, dict)  # Parquet without the text column
                    if size_bytes is None and stop is not None:
                        size_bytes = max(0, stop - start - (self.ledger.bytes_in - before))
                    self.ledger.records_in += 1
                    self.ledger.bytes_in += size_bytes or 0
                    document = self._document(place, identity, record, options, texts)
                    if isinstance(document, str):
                        self.ledger.lost(document, identity, place, size_bytes, is_whole=is_whole)
                        continue
                    document.metadata["listed"] = bool(listed) and int(place.rpartition(":")[2]) - 1 in listed
                    yield document
                self.ledger.files[file]["whole"] = True
            except NOT_THERE as error:
                reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
                self._lost(file, f"{reason} file", None, error.__cause__ or error)

    def _lost(self, file: str, reason: str, size_bytes: int | None, error: BaseException) -> None:
        self.ledger.records_in += 1
        identity = identity_of(self._name(file), 0, self.ledger.task.reader)
        self.ledger.lost(reason, identity, f"{file}:0", size_bytes, message=str(error)[:200])

    def _name(self, file: str) -> str:
        return self.ledger.plan.names.get((self.ledger.task.source, file), file)

    def _document(
        self, place: str, identity: str, record: dict[str, Any] | str, options: dict[str, Any], texts: xxh3_128
    ) -> Document | str:
        """Return the document and add its text to `texts`, or return the mistake."""
        text, content, mistake = text_of(record, options)
        if mistake:
            if mistake.startswith(NO_FIELD) and isinstance(record, dict) and len(self.ledger.fields) < _MOST_FIELDS:
                self.ledger.fields.update(texts_there(record))
            return mistake
        assert isinstance(record, dict)
        identity = own_identity(identity, record, options)
        if nuls := content.count(0):
            self.ledger.note("read", "NULs", identity, place, nuls)
            text, content = text.replace("\0", ""), content.replace(b"\0", b"")
        texts.update(content)
        texts.update(b"\0")
        about = {"where": place, "bucket": record.get("bucket"), "bytes": len(content)}
        return Document(text=text, id=identity, metadata={**about, "split": self._split(identity)})

    def _split(self, identity: str) -> str:
        plan = self.ledger.plan
        return self.ledger.task.split or split_of(identity, plan.seed, plan.hold_out)

    def _listed_duplicates(self, url: str | None) -> set[int]:
        """Return the rows of a file (from 0) that RedPajama lists as duplicates."""
        if url is None:
            return set()
        import pyarrow
        import pyarrow.parquet

        try:
            with open_input(url) as handle:
                listed = pyarrow.parquet.read_table(handle, columns=["doc_id"], use_threads=False)["doc_id"]
            return {int(doc_id.as_py().rpartition("/")[2]) for doc_id in listed}
        except (OSError, KeyError, ValueError, AttributeError, pyarrow.ArrowException) as error:
            self._lost(url, "unreadable list of duplicates", 0, error)
            return set()


def _modified(file: str) -> dict[str, int]:
    """Return the time of a local file's last change, so that later commands can tell whether the file is the same."""
    return {} if "://" in file else {"modified_ns": Path(file).stat().st_mtime_ns}
