"""Read the lines of a local or remote file, compressed or not; only the damaged parts of a file are lost."""

from __future__ import annotations

import asyncio
import codecs
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain
from typing import IO, Any, TypeVar, cast

import fsspec

from nemo_upcycle.data.engine import encodings
from nemo_upcycle.errors import UpcycleError


T = TypeVar("T")
#: Errors on opening a file that mean a mistake in the blend; other errors may be temporary.
NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)

NOT_TEXT, ARCHIVE = "not text", "zip archive, to be unpacked"
_CHUNK_BYTES = 1 << 16
_COMPRESSED_BYTES = 1 << 12  # size of one read; damage loses at most this many bytes
#: Longest line that is read: a file without line ends, given by mistake, must not fill the memory.
LONGEST_LINE_BYTES = 1 << 28
_WAITS_S = (0.5, 1.0, 2.0, 4.0)  # waits between attempts to read a file from a server


class _DamagedError(Exception):
    """Damage in a file, with the number of lost bytes of text; None means that the rest of the file is lost."""


class OtherFormatError(Exception):
    """The bytes of a file have another format than its name says; the argument is the name of the real format."""


@dataclass(frozen=True)
class Damage:
    """An unreadable line or rest of a file, with the number of lost bytes (None: all remaining bytes)."""

    reason: str
    number: int
    size_bytes: int | None


def is_address(text: str) -> bool:
    """Return whether a name is an address, not a file on this machine."""
    return "://" in text and not text.startswith(("file://", "local://"))


def open_input(url: str) -> IO[bytes]:
    """Open a path or fsspec URL.

    Raises:
        OSError: one of `NOT_THERE`.
        UpcycleError: the file cannot be read now; every later read may raise this error, too.
    """
    return cast("IO[bytes]", _Input(url))


def size_of(url: str) -> int | None:
    """Return the stored size of a file (bytes); None if its server does not tell.

    Raises:
        OSError: one of `NOT_THERE`.
        UpcycleError: the file cannot be read now.
    """

    def ask() -> Any:
        filesystem, path = fsspec.core.url_to_fs(url)
        return filesystem.size(path)

    size = _patiently(url, ask)
    return None if size is None else int(size)


class _Input(io.RawIOBase):
    """A file that is reopened at the same place if a read fails."""

    def __init__(self, url: str) -> None:
        self._url, self._place, self._handle = url, 0, None
        _patiently(url, self._opened)

    def _opened(self) -> Any:
        if self._handle is None:
            handle = fsspec.open(self._url, "rb").open()
            handle.seek(self._place)
            self._handle = handle
        return self._handle

    def read(self, size: int = -1) -> bytes:
        try:
            data = _patiently(self._url, lambda: self._tried(size))
        except (*NOT_THERE, ValueError) as error:  # the file exists, so its server cannot start at a position
            raise _unreadable(self._url, error) from error
        self._place += len(data)
        return data

    def _tried(self, size: int) -> bytes:
        try:
            return cast("bytes", self._opened().read(size))
        except Exception:
            with suppress(Exception):
                self.close_handle()
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = self._opened().seek(offset, whence)
        return self._place

    def tell(self) -> int:
        return self._place

    def close_handle(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    def close(self) -> None:
        self.close_handle()
        super().close()


def _patiently(url: str, action: Callable[[], T]) -> T:
    """Run an action on a file, and try again after a while if the server or the network fails.

    A lasting failure is an error. If the failure counted as a damaged file, nobody would notice that the file's texts
    are missing.
    """
    for wait_s in (*(_WAITS_S if is_address(url) else ()), None):
        try:
            return action()
        except (ImportError, ValueError, UpcycleError):
            raise
        except Exception as error:  # each file system raises its own library's errors
            cause = _cause_of(error)
            if isinstance(cause, NOT_THERE):
                raise
            if wait_s is None:
                raise _unreadable(url, cause) from error
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _cause_of(error: Exception) -> BaseException:
    """Return the cause of an error, because fsspec reports every error of a web server as a missing file."""
    import aiohttp

    cause = error.__cause__
    status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
    is_web_error = isinstance(cause, (OSError, asyncio.TimeoutError, aiohttp.ClientError))
    is_other = is_web_error and status not in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
    return cause if is_other and cause else error


def _unreadable(url: str, error: BaseException) -> UpcycleError:
    return UpcycleError(
        url,
        kind="state",
        got=f"cannot be read: {(str(error) or type(error).__name__).splitlines()[0][:200]}",
        fix="make it readable, then run the command again, which resumes the build",
    )


def read_lines(url: str, part: Sequence[int] | None = None) -> Iterator[tuple[int, bytes] | Damage]:
    """Yield the number (from 1) and the bytes of every line, line end included, and yield any damage.

    The bytes of the file tell its compression and whether it is UTF-16. Lines in UTF-16 become UTF-8. A compressed
    file that is damaged or ends too early gives the lines before that point. For a damaged file, the lost text is
    estimated from the compression ratio so far. If a file ends too early, the size of the lost part is unknown, so
    half of the text counts as lost.

    Args:
        url: a path or fsspec URL.
        part: part of a plain text file: its first byte, one past its last byte, and the number of its first line.

    Raises:
        OSError: one of `NOT_THERE`.
        OtherFormatError: the file is Parquet, which has no lines.
        UpcycleError: the file cannot be read now.
    """
    chunks = _text(_of_part(url, part[0], part[1]) if part else _of_file(url))
    rest: list[bytes] = []
    number, rest_bytes = part[2] if part else 1, 0
    damage: tuple[str, int | None] | None = None
    try:
        for chunk in chunks:
            start = 0
            while end := chunk.find(b"\n", start) + 1:
                if rest_bytes > LONGEST_LINE_BYTES:
                    yield Damage("line too long", number, rest_bytes + end - start)
                else:
                    yield number, b"".join((*rest, chunk[start:end]))
                rest, rest_bytes, start = [], 0, end
                number += 1
            if start < len(chunk):
                rest_bytes += len(chunk) - start
                rest = [*rest, chunk[start:]] if rest_bytes <= LONGEST_LINE_BYTES else []
    except _DamagedError as error:
        damage = error.args[0], error.args[1]
    if rest_bytes > LONGEST_LINE_BYTES:
        yield Damage("line too long", number, rest_bytes)
    elif rest and not damage:
        yield number, b"".join(rest)
    if damage:  # the current line is incomplete
        reason, lost_bytes = damage
        yield Damage(reason, number, None if lost_bytes is None else rest_bytes + lost_bytes)


def _of_part(url: str, start: int, stop: int) -> Iterator[bytes]:
    with open_input(url) as handle:
        handle.seek(start)
        left = stop - start
        while left and (chunk := handle.read(min(left, _CHUNK_BYTES))):
            left -= len(chunk)
            yield chunk


def _of_file(url: str) -> Iterator[bytes]:
    with open_input(url) as handle:
        head = b""
        while len(head) < _COMPRESSED_BYTES and (chunk := handle.read(_COMPRESSED_BYTES)):
            head += chunk
        if head.startswith(encodings.PARQUET):
            raise OtherFormatError("parquet")
        if head.startswith(encodings.ZIP):
            raise _DamagedError(ARCHIVE, None)
        new_stream = encodings.decompressor(head)
        size_bytes = _COMPRESSED_BYTES if new_stream else _CHUNK_BYTES
        chunks = chain([head], iter(lambda: handle.read(size_bytes), b""))
        yield from _decompressed(chunks, new_stream) if new_stream else chunks


def _decompressed(chunks: Iterator[bytes], new_stream: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress one stream after the other, and skip the padding of NUL bytes between streams."""
    stream: Any = None
    stored_bytes = text_bytes = 0
    for chunk in chunks:
        stored_bytes += len(chunk)
        while chunk := chunk if stream else chunk.lstrip(b"\0"):
            stream = stream or new_stream()
            try:
                content = stream.decompress(chunk)
            except Exception:  # each library raises its own errors
                left = sum(map(len, chunks))
                raise _DamagedError("damaged compressed file", text_bytes * left // stored_bytes) from None
            text_bytes += len(content)
            yield content
            chunk = stream.unused_data if stream.eof else b""
            stream = None if stream.eof else stream
    if stream:
        raise _DamagedError("truncated compressed file", text_bytes)


def _text(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the bytes of a text without its byte order mark; convert UTF-16 to UTF-8."""
    head = next((chunk for chunk in chunks if chunk), b"")
    if encoding := encodings.utf16(head):
        decoder = codecs.getincrementaldecoder(encoding)("replace")
        yield decoder.decode(head).removeprefix("\ufeff").encode()
        yield from (decoder.decode(chunk).encode() for chunk in chunks)
        yield decoder.decode(b"", final=True).encode()
    elif encodings.is_binary(head):
        raise _DamagedError(NOT_TEXT, None)
    else:
        yield head.removeprefix(codecs.BOM_UTF8)
        yield from chunks
