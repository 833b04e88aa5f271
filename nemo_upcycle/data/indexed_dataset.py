"""The files of Megatron's indexed datasets, `.bin` and `.idx`, without importing Megatron.

The layout is that of `megatron.core.datasets.indexed_dataset`: the index holds a header, the lengths of all sequences
(int32), where each begins in the tokens (int64), and the number of the first sequence of every document and of the one
that would come next (int64). Tests hold it to Megatron's own reader and builder.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np


#: Magic, version, code of the token type, number of sequences, entries of the document index.
HEADER = struct.Struct("<9sQBQQ")
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
#: Bytes of a token by the type's code: int32 and uint16.
TOKEN_BYTES = {4: 4, 8: 2}


def join_datasets(pieces: Sequence[Path], output: Path) -> None:
    """Write the sequences and documents of several datasets, of one token type, into one.

    Args:
        pieces: their paths, without suffix.
        output: the path to write, without suffix.
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


def _read_index(prefix: Path) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the code of the token type, the lengths of the sequences, and the document index."""
    with prefix.with_name(f"{prefix.name}.idx").open("rb") as index:
        _, _, code, sequences, documents = HEADER.unpack(index.read(HEADER.size))
        lengths = np.frombuffer(index.read(4 * sequences), dtype=np.int32)
        index.seek(8 * sequences, 1)
        return code, lengths, np.frombuffer(index.read(8 * documents), dtype=np.int64)
