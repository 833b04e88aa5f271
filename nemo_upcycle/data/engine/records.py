"""The records of a file and their texts, read in the same way by the engine and by the first look before a build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from nemo_upcycle.data.engine.encodings import MOST_BAD, count_bad
from nemo_upcycle.data.engine.lines import NOT_TEXT, OtherFormatError
from nemo_upcycle.data.readers import FORMATS, NO_FIELD


def records_of(
    file: str, name: str, format: str, options: Mapping[str, Any]
) -> Iterator[tuple[str, str, int | None, dict[str, Any] | str]]:
    """Yield, for every record of a file, its place, its id, its bytes, and its object or its mistake.

    Bytes of None mean all the rest of the file.

    Args:
        file: path or fsspec URL.
        name: name of the file inside its source.
        format: format according to the file's name; the bytes may have another format.
        options: options of the format.
    """
    try:
        for line, size_bytes, record in FORMATS[format].read(file, options):
            yield f"{file}:{line}", identity_of(name, line, format), size_bytes, record
    except OtherFormatError as other:
        yield from records_of(file, name, str(other), options)


def identity_of(name: str, line: int, format: str) -> str:
    """Return the id of a record that has no id of its own."""
    return name if FORMATS[format].is_document else f"{name}:{line}"


def own_identity(identity: str, record: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return the id of a document, prefixed with the record's own id if it has one; own ids may repeat."""
    own = record.get(options.get("id_key", "id"))
    return identity if own is None else f"{own}@{identity}"


def text_of(record: dict[str, Any] | str, options: Mapping[str, Any]) -> tuple[str, bytes, str]:
    """Return the text of a record, its bytes in UTF-8, and its mistake, which is "" if there is none."""
    if isinstance(record, str):
        return "", b"", record
    key = options.get("text_key", "text")
    text = record.get(key)
    if not isinstance(text, str):
        return "", b"", f"{NO_FIELD} {key}" if text is None else f"{key} is not a string"
    content = text.encode()
    if count_bad(text, content) > MOST_BAD * len(text):
        return "", b"", NOT_TEXT
    return text, content, ""


def texts_there(record: Mapping[str, Any]) -> dict[str, int]:
    """Return the text fields of a record, each with its length plus one."""
    return {name: len(value) + 1 for name, value in record.items() if isinstance(value, str)}


def split_of(identity: str, seed: int, hold_out: Mapping[str, float]) -> str:
    """Draw the split of a document whose source has no splits of its own.

    Args:
        identity: id of the document.
        seed: seed of the blend.
        hold_out: split -> share of the documents.
    """
    digest = blake2b(f"{seed}:{identity}".encode(errors="surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    for split, share in sorted(hold_out.items()):
        if place < share:
            return split
        place -= share
    return "train"


def names_inside(files: Sequence[str]) -> dict[str, str]:
    """Name the files of a source without their common folders, so that document ids do not depend on the location.

    Example:
        >>> names_inside(["/data/a/1.txt", "/data/b/1.txt"])
        {'/data/a/1.txt': 'a/1.txt', '/data/b/1.txt': 'b/1.txt'}
    """
    parts = [file.split("/") for file in files]
    shortest = min(len(file) for file in parts) - 1
    shared = next((n for n in range(shortest) if len({file[n] for file in parts}) > 1), shortest)
    return {"/".join(file): "/".join(file[shared:]) for file in parts}
