"""Read the first documents of files as the engine does: `python -m nemo_upcycle.data.engine.sample < REQUEST`.

The request and the answer are JSON. The module runs in the data environment, which has the packages that the readers
need.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from nemo_upcycle.data.engine.lines import NOT_THERE, open_input
from nemo_upcycle.data.engine.records import own_identity, records_of, text_of, texts_there
from nemo_upcycle.data.readers import FORMATS
from nemo_upcycle.errors import UpcycleError


#: Characters to tokenise for the estimate of tokens per byte.
_TOKENISED = 200_000
#: Number of documents to read to compare the lengths of fields, and number of records to read to find the fields of a
#: file.
_MEASURED, _OF_A_FILE = 50, 20


def sample(request: Mapping[str, Any]) -> dict[str, Any]:
    """Read files until there are enough documents or bytes.

    Args:
        request: `files` (each with `path`, `name`, `reader` and `options`), `documents` and `bytes` (limits of the
            sample), and `tokenizer` (path of a `tokenizer.json`, or None).

    Returns:
        `documents` (id and bytes of each), `lost` (reason -> count and first place), `fields` (field -> characters, in
        the first file that has records without a text), `read_bytes` (of each file; None means the whole file),
        `tokens_per_byte`.
    """
    documents: list[tuple[str, int]] = []
    lost: dict[str, tuple[int, str]] = {}
    fields, lacking = Counter[str](), request["files"][0]
    read_bytes: list[int | None] = []
    texts: list[str] = []
    total_bytes = characters = 0
    for file in request["files"]:
        options = {**FORMATS[file["reader"]].defaults, **file["options"]}
        file_bytes, is_whole = 0, True
        try:
            for place, identity, size_bytes, record in _records(file, options):
                if len(documents) + sum(count for count, _ in lost.values()) >= request["documents"]:
                    is_whole = False
                    break
                text, content, mistake = text_of(record, options)
                file_bytes += size_bytes or 0
                if mistake or not isinstance(record, dict):
                    count, first = lost.get(mistake, (0, place))
                    lost[mistake] = count + 1, first
                    if isinstance(record, dict) and not fields:
                        fields, lacking = Counter(texts_there(record)), file
                    continue
                documents.append((own_identity(identity, record, options), len(content)))
                total_bytes += len(content)
                if characters < _TOKENISED:
                    texts.append(text[: _TOKENISED - characters])
                    characters += len(texts[-1])
        except NOT_THERE as error:
            lost[f"missing file ({error})"] = 1, f"{file['path']}:0"
        read_bytes.append(None if is_whole else file_bytes)
        if not is_whole or total_bytes >= request["bytes"]:
            break
    # The lengths of a Parquet column are unknown until the column is read.
    fields = Counter({name: _length(lacking, name) for name in fields})
    return {
        "documents": documents,
        "lost": lost,
        "fields": dict(fields.most_common()),
        "read_bytes": read_bytes,
        "tokens_per_byte": _tokens_per_byte(request["tokenizer"], texts),
    }


def schemas(files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read the first records of each file.

    Args:
        files: `path`, `reader` and `options` of each file.

    Returns:
        For each file, `records` (number of records read), `fields` (name of a text field -> number of records with
        this field, and number of characters in the field; None if the whole file is one text) and `rows` (number of
        all records, if the file states this number).
    """
    return [_schema({**file, "name": file["path"]}) for file in files]


def _schema(file: Mapping[str, Any]) -> dict[str, Any]:
    if FORMATS[file["reader"]].is_document:
        return {"records": 1, "fields": None}
    rows = None
    options = {**FORMATS[file["reader"]].defaults, **file["options"]}
    records = _first(file, options | {"text_key": ""})
    if len(records) == 1 and isinstance(records[0], dict) and not any(records[0].values()):  # Parquet: columns only
        texts = {name: _first(file, options | {"text_key": name}) for name in records[0]}
        count, rows = max(map(len, texts.values()), default=0), _rows(file["path"])
        records = [
            {name: row.get(name) for name, rows in texts.items() for row in rows[n : n + 1] if isinstance(row, dict)}
            for n in range(count)
        ]
    fields: dict[str, list[int]] = {}
    for record in records:
        for name, length in texts_there(record).items() if isinstance(record, dict) else ():
            having, characters = fields.get(name, (0, 0))
            fields[name] = [having + 1, characters + length]
    return {"records": len(records), "fields": fields, "rows": rows}


def _rows(path: str) -> int:
    """Count the rows of a Parquet file."""
    import pyarrow.parquet

    with open_input(path) as handle:
        return int(pyarrow.parquet.read_metadata(handle).num_rows)


def _first(file: Mapping[str, Any], options: Mapping[str, Any]) -> list[Any]:
    return [record for *_, record in islice(_records(file, options), _OF_A_FILE)]


def _records(file: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    return records_of(file["path"], file["name"], file["reader"], options)


def _length(file: Mapping[str, Any], field: str) -> int:
    """Count the characters of a field in the first documents of a file."""
    options = {**FORMATS[file["reader"]].defaults, **file["options"], "text_key": field}
    first = islice(_records(file, options), _MEASURED)
    return sum(len(text_of(record, options)[0]) for *_, record in first)


def _tokens_per_byte(tokenizer: str | None, texts: list[str]) -> float | None:
    size_bytes = sum(len(text.encode()) for text in texts)
    if not (tokenizer and size_bytes):
        return None
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(tokenizer).encode_batch(texts, add_special_tokens=False)
    return (sum(map(len, encoded)) + len(texts)) / size_bytes  # one end-of-text token for each text


if __name__ == "__main__":
    try:
        request = json.load(sys.stdin)
        json.dump(schemas(request["schemas"]) if "schemas" in request else sample(request), sys.stdout)
    except UpcycleError as error:
        sys.exit(f"error: {error}")
