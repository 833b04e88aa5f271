"""Search a text in tokens, without missing texts that a tokenizer splits in several ways.

The search compares texts and not tokens. To be fast, it first looks for the tokens that can hold one certain byte of
the text, and decodes only the tokens around them. A document with the text always has such a token at that byte, so
no document is missed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


#: Bytes of the text from which the byte with the rarest tokens is chosen.
_PREFIX_BYTES = 256
#: Texts on which the decoding by a table is compared with the tokenizer's own.
_PROBE = (
    "Ten years\t later,  12345.678 x≠y; don\u2019t — I'll!\r\n\n   naïve café Ünïcødé e\u0301 \u200b ½",
    "日本語のテキスト。한국어 العربية हिन्दी 👩\u200d👩\u200d👧",
    "    def f(x):\n        return {'a': [x ** 2, -1e-9]}  # <html>&nbsp;</html>\n\t\t\tif (a&&b||!c) {}",
)  # fmt: skip
#: Decoders of tokenizers that write a blank as `▁`, like SentencePiece.
_SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class TextSearch:
    """Searches a text in the tokens of documents.

    Args:
        tokenizer: folder of the tokenizer that made the tokens.
        end: id of the token that ends a document.
        text: text to search.

    Example:
        >>> list(TextSearch(Path("data/mine/tokenizer"), 0, "Union").documents(lengths, ids))  # doctest: +SKIP
        [3, 17]
    """

    def __init__(self, tokenizer: Path, end: int, text: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._end = end
        self._texts = [one.encode("utf-8", "surrogateescape") for one in _spellings(self._tokenizer, text)]
        self._pieces = token_bytes(self._tokenizer)
        self._is_needed: NDArray[np.bool_] | None = None

    def documents(self, lengths: NDArray[np.int32], ids: NDArray[Any]) -> Iterator[int]:
        """Yield the numbers of the documents that contain the text.

        Args:
            lengths: lengths of the documents (tokens).
            ids: tokens of all documents in a row.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        if self._pieces is None:
            yield from (number for number in range(len(ends)) if self._is_in(ids[starts[number] : ends[number]]))
            return
        if self._is_needed is None:
            self._is_needed = _needed(self._pieces, self._texts, np.bincount(ids, minlength=len(self._pieces)))
        hits = np.flatnonzero(self._is_needed.take(ids))
        numbers, at, counts = np.unique(np.searchsorted(ends, hits, "right"), return_index=True, return_counts=True)
        reach = max(map(len, self._texts))  # most tokens of a text, because a token has at least one byte
        for number, first, count in zip(numbers.tolist(), at.tolist(), counts.tolist(), strict=True):
            start, end = int(starts[number]), int(ends[number])
            near = ((max(start, hit - reach), min(end, hit + reach)) for hit in hits[first : first + count].tolist())
            parts = near if 2 * reach * count < end - start else [(start, end)]
            if any(self._is_in(ids[part[0] : part[1]]) for part in parts):
                yield number

    def _is_in(self, ids: NDArray[Any]) -> bool:
        text = self._decode(ids.tolist())
        return any(one in text for one in self._texts)

    def _decode(self, ids: list[int]) -> bytes:
        if ids[-1:] == [self._end]:
            ids.pop()
        if self._pieces:
            return b"".join(map(self._pieces.__getitem__, ids))
        return str(self._tokenizer.decode(ids, skip_special_tokens=False)).encode()


def _spellings(tokenizer: Any, text: str) -> set[str]:
    """Return a text as typed and, if the tokenizer normalises it (such as to lower case), as documents have it."""
    if text != text.encode("utf-8", "replace").decode():
        return {text}  # an argument of a command that is not UTF-8
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    unknown = json.loads(tokenizer.to_str())["model"].get("unk_token")
    normalised = tokenizer.decode(ids, skip_special_tokens=False)
    is_known = tokenizer.token_to_id(unknown) not in ids if unknown else True
    return {text, normalised} if is_known and normalised.strip() not in ("", text.strip()) else {text}


def token_bytes(tokenizer: Any) -> list[bytes] | None:
    """Return the bytes of each token, which form a document's text when they are joined.

    Args:
        tokenizer: tokenizer of the library `tokenizers`.

    Returns:
        One entry for each id; None if the tokenizer decodes a token differently beside other tokens. A document of
        SentencePiece tokens begins with a blank, which the tokenizer's own decoding omits.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": ""}
    kinds = {one["type"] for one in decoder.get("decoders", [decoder])}
    if kinds == {"ByteLevel"}:
        alphabet = _byte_level_alphabet()

        def piece_of(token: str) -> bytes:
            known = [alphabet.get(character) for character in token]
            return token.encode() if None in known else bytes(byte for byte in known if byte is not None)
    elif kinds <= _SENTENCEPIECE:

        def piece_of(token: str) -> bytes:
            is_byte = len(token) == len("<0x00>") and token.startswith("<0x")
            return bytes.fromhex(token[3:5]) if is_byte else token.replace("▁", " ").encode()
    else:
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        pieces[number] = piece_of(token)
    for encoding in tokenizer.encode_batch(list(_PROBE), add_special_tokens=False):
        joined = b"".join(pieces[number] for number in encoding.ids).decode("utf-8", "replace")
        if joined.lstrip(" ") != tokenizer.decode(encoding.ids, skip_special_tokens=False).lstrip(" "):
            return None
    return pieces


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character in a token of a byte-level tokenizer, as GPT-2 introduced it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _needed(pieces: Sequence[bytes], texts: Iterable[bytes], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark tokens; each document with one of the texts has a marked token.

    Every byte of a text in a document belongs to one token. For each byte, the tokens that can hold the byte are
    known: they agree with the text around the byte. The byte with the rarest tokens decides.

    Args:
        pieces: bytes of each token.
        texts: the texts.
        counts: for each token, how often a part of the data has it.
    """
    is_needed = np.zeros(len(pieces), bool)
    for whole in texts:
        text = whole[:_PREFIX_BYTES]
        rows = [(number, *place) for number, piece in enumerate(pieces) for place in _places_in(piece, text)]
        tokens, starts, ends = np.array(rows, np.int64).reshape(-1, 3).T
        frequency = np.zeros(len(text) + 1)
        np.add.at(frequency, starts, counts[tokens])
        np.add.at(frequency, ends, -counts[tokens])
        rarest = int(np.cumsum(frequency)[:-1].argmin())
        is_needed[tokens[(starts <= rarest) & (rarest < ends)]] = True
    return is_needed


def _places_in(piece: bytes, text: bytes) -> Iterator[tuple[int, int]]:
    """Yield the parts of a text that a token can hold; the token may reach over the ends of the text."""
    length = len(text)
    start = text.find(piece) if piece else -1
    while start >= 0:
        yield start, start + len(piece)
        start = text.find(piece, start + 1)
    for cut in range(1, len(piece)):
        if text.startswith(piece[cut:]):
            yield 0, len(piece) - cut
        if text.endswith(piece[:cut]):
            yield length - cut, length
    if len(piece) > length and text in piece:
        yield 0, length
