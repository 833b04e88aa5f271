"""Read the lines of a file, compressed or not, near or far; what is damaged costs only itself."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import fsspec


_CHUNK_BYTES = 1 << 16
_COMPRESSED_BYTES = 1 << 12  # what damage costs, at most
#: A file without line ends, given by mistake, must not fill the memory.
LONGEST_LINE_BYTES = 1 << 28


class _DamagedError(Exception):
    """What is wrong with a compressed file."""


@dataclass(frozen=True)
class Damage:
    """Something that could not be read, at a place, with its size where it is known."""

    reason: str
    line: int
    size_bytes: int = 0


def open_input(url: str) -> IO[bytes]:
    """Open a path or fsspec URL.

    Raises:
        OSError: it is not there, or not readable.
    """
    return cast("IO[bytes]", fsspec.open(url, "rb").open())


def reading_errors() -> tuple[type[Exception], ...]:
    """Return what reading may raise, over a network, too."""
    import aiohttp

    return OSError, asyncio.TimeoutError, aiohttp.ClientError


def size_of(url: str) -> int:
    """Return the bytes of a file as it is stored.

    Raises:
        OSError: it is not there, or not readable.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    return int(filesystem.size(path))


def read_lines(url: str, handle: IO[bytes]) -> Iterator[tuple[int, bytes] | Damage]:
    """Yield the number, from 1, and the bytes of every line, with its end; and what was damaged.

    A compressed file that ends too early, or is damaged, gives the lines before that.

    Args:
        url: the name of the file, which says how it is compressed.
        handle: the file.
    """
    is_compressed = url.endswith((".gz", ".zst", ".zstd"))
    size_bytes = _COMPRESSED_BYTES if is_compressed else _CHUNK_BYTES
    chunks: Iterable[bytes] = iter(lambda: handle.read(size_bytes), b"")
    if is_compressed:
        chunks = _inflated(chunks, _gzip if url.endswith(".gz") else _zstd)
    rest: list[bytes] = []
    number, rest_bytes, damage = 1, 0, ""
    is_first = True
    try:
        for chunk in chunks:
            if is_first:
                chunk, is_first = chunk.removeprefix(b"\xef\xbb\xbf"), False
            start = 0
            while end := chunk.find(b"\n", start) + 1:
                if rest_bytes > LONGEST_LINE_BYTES:
                    yield Damage("line too long", number, rest_bytes)
                else:
                    yield number, b"".join((*rest, chunk[start:end]))
                rest, rest_bytes, start = [], 0, end
                number += 1
            if start < len(chunk):
                rest_bytes += len(chunk) - start
                rest = [*rest, chunk[start:]] if rest_bytes <= LONGEST_LINE_BYTES else []
    except _DamagedError as error:
        damage = str(error)
    except reading_errors():
        damage = "reading failed"
    if rest_bytes > LONGEST_LINE_BYTES:
        yield Damage("line too long", number, rest_bytes)
    elif rest and not damage:
        yield number, b"".join(rest)
    if damage:  # the line at hand is a part of one
        yield Damage(damage, number, rest_bytes)


def _gzip() -> Any:
    return zlib.decompressobj(wbits=31)


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _inflated(chunks: Iterable[bytes], new: Any) -> Iterator[bytes]:
    """Decompress one stream after the other."""
    import zstandard

    stream = None
    for chunk in chunks:
        while chunk:
            stream = stream or new()
            try:
                yield stream.decompress(chunk)
            except (zlib.error, zstandard.ZstdError):
                raise _DamagedError("damaged compressed file") from None
            chunk = stream.unused_data if stream.eof else b""
            stream = None if stream.eof else stream
    if stream:
        raise _DamagedError("truncated compressed file")
