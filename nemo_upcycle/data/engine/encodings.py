"""Recognise the format of a file from its bytes: compressed or not, UTF-8, UTF-16, Latin-1, or no text."""

from __future__ import annotations

import bz2
import codecs
import lzma
import re
import zlib
from typing import Any


PARQUET, ZIP = b"PAR1", (b"PK\x03\x04", b"PK\x05\x06")
#: Suffixes of compressed files.
COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
#: Largest share of bad characters in a document; with more, the document is not text.
MOST_BAD = 0.02
#: Largest share of control characters at the start of a file in an unknown encoding; with more, the file is not text.
#: Random bytes contain 11 % control characters.
_MOST_CONTROL = 0.05

_GZIP, _BZIP2, _XZ = rb"\x1f\x8b\x08", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", rb"\xfd7zXZ\0"
_ZSTANDARD = rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"  # second pattern: pzstd's skippable frame
_CONTROL = bytes({*range(0x20), 0x7F} - {*b"\t\n\v\f\r\b\x1b"})  # logs of terminals contain \b and \x1b
_C1 = re.compile(rb"\xc2[\x80-\x9f]")
_RUNS = re.compile(rb"[\x80-\xff]{3,}")
_ASCII = bytes(range(0x80))


def decompressor(head: bytes) -> Any:
    """Return a function that makes a decompressor for a stream with these first bytes; None for plain streams."""
    if re.match(_GZIP, head):
        return lambda: zlib.decompressobj(wbits=31)
    if re.match(_ZSTANDARD, head):
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    if re.match(_BZIP2, head):
        return bz2.BZ2Decompressor
    return lzma.LZMADecompressor if re.match(_XZ, head) else None


def utf16(head: bytes) -> str | None:
    """Return the UTF-16 variant that the byte order mark of a text names, or None without a mark."""
    marks = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
    return marks.get(head[:2])


def is_plain(head: bytes) -> bool:
    """Return whether a file's first bytes are ASCII, UTF-8 or Latin-1 text, whose lines end at bytes of value 10."""
    is_stored = head.startswith((PARQUET, *ZIP)) or decompressor(head)
    return not (is_stored or utf16(head) or is_binary(head))


def is_binary(head: bytes) -> bool:
    """Return whether a file's first bytes are not text in any encoding."""
    if _count_control(head) <= _MOST_CONTROL * len(head):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return False


def decode(content: bytes) -> str:
    """Decode UTF-8, or Latin-1 as Windows writes it.

    Raises:
        UnicodeDecodeError: the content is neither UTF-8 nor Latin-1. Several bytes in a row that are not ASCII
            indicate another script, and fragments of UTF-8 indicate damaged UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError:
        beyond = len(content.translate(None, _ASCII))
        in_rows = sum(map(len, _RUNS.findall(content)))
        if in_rows * 4 > beyond or not content.decode(errors="ignore").isascii() or _count_control(content):
            raise
        return content.decode("cp1252")


def count_bad(text: str, content: bytes) -> int:
    """Count the characters that no text should have: control characters, and U+FFFD, which marks lost characters.

    Args:
        text: a text.
        content: the text's bytes in UTF-8.
    """
    bad = _count_control(content)
    return bad if text.isascii() else bad + text.count("\ufffd") + len(_C1.findall(content))


def _count_control(content: bytes) -> int:
    return len(content) - len(content.translate(None, _CONTROL))
