"""The first step: read text, JSON lines, Parquet and RedPajama-V2; count what is unreadable, with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import orjson
from datatrove.data import Document, DocumentsPipeline
from xxhash import xxh3_128

from nemo_upcycle.data.engine.ledger import LedgerStep
from nemo_upcycle.data.engine.lines import NOT_THERE, Damage, open_input, open_to_seek, read_lines, size_of


#: What a reader gives: the line or row from 1, its bytes, and the object there or what is wrong with it.
Found = Iterator[tuple[int, int, "dict[str, Any] | str"]]


class ReadDocuments(LedgerStep):
    """Reads the files of a task. datatrove's own readers lose what follows a damaged line."""

    type, name = "reader", "files of the plan"

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of every file of the task."""
        task = self.ledger.task
        read = {"text": _read_text, "parquet": _read_parquet}.get(task.reader, _read_jsonl)
        for file in task.files:
            options = {**_DEFAULTS.get(task.reader, {}), **task.options}
            listed = self._listed_duplicates(options.get("duplicates", {}).get(file))
            try:
                self.ledger.files[file] = {"bytes": size_of(file), "whole": False}
                texts = self.ledger.texts[file] = xxh3_128()
                for line, size_bytes, found in read(file, options):
                    self.ledger.things_in += 1
                    self.ledger.bytes_in += size_bytes
                    document = self._document(file, line, found, options)
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
        self.ledger.things_in += 1
        self.ledger.removed("read", reason, self._identity(file, 0), f"{file}:0", 0, message=str(error)[:200])

    def _identity(self, file: str, line: int) -> str:
        task = self.ledger.task
        name = self.ledger.plan.names.get((task.source, file), file)
        return name if task.reader == "text" else f"{name}:{line}"

    def _document(self, file: str, line: int, found: dict[str, Any] | str, options: dict[str, Any]) -> Document | str:
        """Return the document, or what is wrong with it."""
        if isinstance(found, str):
            return found
        key = options.get("text_key", "text")
        text = found.get(key)
        if not isinstance(text, str):
            return f"no {key}" if text is None else f"{key} is no text"
        own = found.get(options.get("id_key", "id"))
        identity = self._identity(file, line)
        if own is not None:  # two documents may have the same
            identity = f"{own}@{identity}"
        where = {"where": f"{file}:{line}", "bucket": found.get("bucket")}
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


_DEFAULTS = {"redpajama_v2": {"text_key": "raw_content", "id_key": "id"}}


def _read_jsonl(file: str, options: dict[str, Any]) -> Found:
    is_empty, last = True, 0
    with open_input(file) as handle:
        for found in read_lines(file, handle):
            is_empty = False
            if isinstance(found, Damage):
                yield found.line, found.size_bytes, found.reason
                continue
            last, line = found
            if line.strip():
                yield last, len(line), _parsed(line)
    if is_empty:
        yield 0, 0, "empty file"


def _parsed(line: bytes) -> dict[str, Any] | str:
    try:
        value = orjson.loads(line)
    except ValueError:
        try:
            value = json.loads(line.decode())  # Python writes NaN, which orjson refuses
            orjson.dumps(value)  # a half of a surrogate pair is no text
        except UnicodeDecodeError:
            return "not UTF-8"
        except (ValueError, TypeError, RecursionError):
            return "broken JSON"
    return value if isinstance(value, dict) else "no JSON object"


def _read_text(file: str, options: dict[str, Any]) -> Found:
    """A file is a document; a line that is not UTF-8 is left out of it."""
    kept, size_bytes = [], 0
    with open_input(file) as handle:
        for found in read_lines(file, handle):
            if isinstance(found, Damage):
                yield found.line, found.size_bytes, found.reason
                continue
            try:
                kept.append(found[1].decode())
                size_bytes += len(found[1])
            except UnicodeDecodeError:
                yield found[0], len(found[1]), "not UTF-8"
    yield 1, size_bytes, {options.get("text_key", "text"): "".join(kept)} if kept else "empty file"


def _read_parquet(file: str, options: dict[str, Any]) -> Found:
    import pyarrow
    import pyarrow.parquet

    keys = [options.get("text_key", "text"), options.get("id_key", "id"), "bucket"]
    row = 0
    with open_to_seek(file) as handle:
        try:
            table = pyarrow.parquet.ParquetFile(handle)
            there = [key for key in keys if key in table.schema_arrow.names]
            if keys[0] not in there:
                yield 0, 0, f"no column {keys[0]}"
                return
            if table.metadata.num_rows == 0:
                yield 0, 0, "empty file"
            texts = [key for key in there if _is_text(table.schema_arrow.field(key).type)]
            for batch in table.iter_batches(1000, columns=there, use_threads=False):
                for found in _as_bytes(batch).to_pylist():
                    row += 1
                    yield row, len(found[keys[0]] or b"") if keys[0] in texts else 0, _decoded(found, texts)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            yield row + 1, 0, f"damaged Parquet file ({type(error).__name__})"


def _is_text(kind: Any) -> bool:
    """Return whether a column of Parquet holds texts, or numbers of texts in a list of them."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _as_bytes(batch: Any) -> Any:
    """Return a batch with the bytes of its texts: Arrow decodes all of a column, or nothing."""
    import pyarrow

    for number, field in enumerate(batch.schema):
        if _is_text(field.type):
            column = batch.column(number)
            column = column.dictionary_decode() if pyarrow.types.is_dictionary(field.type) else column
            batch = batch.set_column(number, field.name, column.cast(pyarrow.large_binary()))
    return batch


def _decoded(found: dict[str, Any], texts: list[str]) -> dict[str, Any] | str:
    try:
        return found | {key: found[key].decode() for key in texts if found[key] is not None}
    except UnicodeDecodeError:
        return "not UTF-8"
