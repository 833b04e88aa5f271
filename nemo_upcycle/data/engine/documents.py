"""The first step: read documents; count what is unreadable, with its place."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from xxhash import xxh3_128

from nemo_upcycle.data.engine.ledger import LedgerStep
from nemo_upcycle.data.engine.lines import NOT_THERE, open_to_seek, size_of
from nemo_upcycle.data.readers import FORMATS


class ReadDocuments(LedgerStep):
    """Reads the files of a task. datatrove's own readers lose what follows a damaged line."""

    type, name = "reader", "files of the plan"

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of every file of the task."""
        task = self.ledger.task
        format = FORMATS[task.reader]
        options = {**format.defaults, **task.options}
        for file in task.files:
            listed = self._listed_duplicates(options.get("duplicates", {}).get(file))
            try:
                self.ledger.files[file] = {"bytes": size_of(file), "whole": False}
                texts = self.ledger.texts[file] = xxh3_128()
                for line, size_bytes, record in format.read(file, options):
                    self.ledger.records_in += 1
                    self.ledger.bytes_in += size_bytes
                    document = self._document(file, line, record, options)
                    if isinstance(document, str):
                        self.ledger.removed("read", document, self._identity(file, line), f"{file}:{line}", size_bytes)
                        continue
                    texts.update(document.text.encode() + b"\0")
                    document.metadata["listed"] = line - 1 in listed
                    yield document
                self.ledger.files[file]["whole"] = True  # unless max_tokens ended the task before
            except NOT_THERE as error:
                reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
                self._lost(file, f"{reason} file", error.__cause__ or error)

    def _lost(self, file: str, reason: str, error: BaseException) -> None:
        self.ledger.records_in += 1
        self.ledger.removed("read", reason, self._identity(file, 0), f"{file}:0", 0, message=str(error)[:200])

    def _identity(self, file: str, line: int) -> str:
        task = self.ledger.task
        name = self.ledger.plan.names.get((task.source, file), file)
        return name if FORMATS[task.reader].is_document else f"{name}:{line}"

    def _document(self, file: str, line: int, record: dict[str, Any] | str, options: dict[str, Any]) -> Document | str:
        """Return the document, or what is wrong with it."""
        if isinstance(record, str):
            return record
        key = options.get("text_key", "text")
        text = record.get(key)
        if not isinstance(text, str):
            return f"no {key}" if text is None else f"{key} is no text"
        own = record.get(options.get("id_key", "id"))
        identity = self._identity(file, line)
        if own is not None:  # two documents may have the same
            identity = f"{own}@{identity}"
        where = {"where": f"{file}:{line}", "bucket": record.get("bucket")}
        return Document(text=text, id=identity, metadata={**where, "split": self._split(identity)})

    def _split(self, identity: str) -> str:
        plan = self.ledger.plan
        if self.ledger.task.split:
            return self.ledger.task.split
        digest = blake2b(f"{plan.seed}:{identity}".encode(errors="surrogatepass"), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        for split, share in sorted(plan.hold_out.items()):
            if place < share:
                return split
            place -= share
        return "train"

    def _listed_duplicates(self, url: str | None) -> set[int]:
        """Return the rows, from 0, that RedPajama's list of duplicates of a file names."""
        if url is None:
            return set()
        import pyarrow
        import pyarrow.parquet

        try:
            with open_to_seek(url) as handle:
                listed = pyarrow.parquet.read_table(handle, columns=["doc_id"], use_threads=False)["doc_id"]
            return {int(doc_id.as_py().rpartition("/")[2]) for doc_id in listed}
        except (OSError, KeyError, ValueError, AttributeError, pyarrow.ArrowException) as error:
            self._lost(url, "unreadable list of duplicates", error)
            return set()
