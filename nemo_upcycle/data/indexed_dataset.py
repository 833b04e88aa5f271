"""Join and check Megatron's indexed datasets (`.bin` and `.idx` files) without importing Megatron.

`megatron.core.datasets.indexed_dataset` defines the layout. The index holds a header, the length of each sequence
(int32), the byte offset of each sequence in the tokens (int64), and the number of the first sequence of each document,
with the number of sequences at the end (int64). Tests compare this module with Megatron's own reader and builder.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_upcycle.errors import UpcycleError


#: Magic, version, code of the token type, number of sequences, entries of the document index.
HEADER = struct.Struct("<9sQBQQ")
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
#: Code of the token type -> bytes of a token: int32 and uint16.
TOKEN_BYTES = {4: 4, 8: 2}
#: Fix for a damaged finished folder.
AGAIN = "copy the folder again, or delete it and run the command that made it again"


def join_datasets(pieces: Sequence[Path], output: Path) -> None:
    """Join the sequences and documents of several datasets of one token type into one dataset.

    Args:
        pieces: paths of the pieces, without suffix.
        output: path to write, without suffix.
    """
    lengths, documents, codes, sequences = [], [np.zeros(1, dtype=np.int64)], set(), 0
    with output.with_name(f"{output.name}.bin").open("wb") as joined:
        for piece in pieces:
            code, piece_lengths, piece_documents = _read_index(piece)
            codes.add(code)
            lengths.append(piece_lengths)
            documents.append(piece_documents[1:] + sequences)
            sequences += len(piece_lengths)
            with piece.with_name(f"{piece.name}.bin").open("rb") as tokens:
                shutil.copyfileobj(tokens, joined, 1 << 22)
    (code,) = codes
    every = np.concatenate(lengths)
    starts = np.zeros(len(every), dtype=np.int64)
    np.cumsum(every[:-1].astype(np.int64) * TOKEN_BYTES[code], out=starts[1:])
    of_documents = np.concatenate(documents)
    with output.with_name(f"{output.name}.idx").open("wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, code, len(every), len(of_documents)))
        for array in (every, starts, of_documents):
            index.write(array.tobytes())


def read_documents(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of the documents, and the tokens of all documents in a row, memory-mapped.

    Args:
        prefix: path of the dataset, without suffix. A document is a sequence; its tokens follow those before it, as
            `nemo-upcycle data` writes them.
    """
    code, lengths, _ = _read_index(prefix)
    kind = {4: np.int32, 8: np.uint16}[code]
    return lengths, np.memmap(prefix.with_name(f"{prefix.name}.bin"), dtype=kind, mode="r")


def _read_index(prefix: Path) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the code of the token type, the lengths of the sequences, and the document index."""
    with prefix.with_name(f"{prefix.name}.idx").open("rb") as index:
        _, _, code, sequences, documents = HEADER.unpack(index.read(HEADER.size))
        lengths = np.frombuffer(index.read(4 * sequences), dtype=np.int32)
        index.seek(8 * sequences, 1)
        return code, lengths, np.frombuffer(index.read(8 * documents), dtype=np.int64)


def tokens_of(prefix: Path) -> int:
    """Count the tokens of the indexed dataset at a path without suffix.

    Raises:
        UpcycleError: one of the two files does not have the size that the index states.
    """
    index, data = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    require_size(index, HEADER.size, at_least=True)
    with index.open("rb") as handle:
        magic, _, code, sequences, documents = HEADER.unpack(handle.read(HEADER.size))
        if magic != MAGIC or code not in TOKEN_BYTES:
            raise UpcycleError(str(index), kind="state", got="is not an index of Megatron's", fix=AGAIN)
        require_size(index, HEADER.size + 12 * sequences + 8 * documents)
        if not sequences:
            return 0
        # The lengths in tokens (4 bytes each) come first, then the byte offsets of the sequences (8 bytes each).
        handle.seek(HEADER.size + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", handle.read(4))
        handle.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (start,) = struct.unpack("<q", handle.read(8))
    size_bytes = start + length * TOKEN_BYTES[code]
    require_size(data, size_bytes)
    return size_bytes // TOKEN_BYTES[code]


def require_size(path: Path, size_bytes: int, *, at_least: bool = False) -> None:
    """Check the size of a file of a finished folder.

    Raises:
        UpcycleError: the file is missing, or has another size.
    """
    actual_bytes = path.stat().st_size if path.is_file() else None
    if actual_bytes is None or actual_bytes < size_bytes or (actual_bytes > size_bytes and not at_least):
        raise UpcycleError(
            str(path),
            kind="state",
            got="does not exist"
            if actual_bytes is None
            else f"has {actual_bytes} bytes instead of {size_bytes}{(' or more' if at_least else '')}",
            fix=AGAIN,
        )
