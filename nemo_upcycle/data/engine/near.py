"""Near duplicates, found by datatrove's MinHash over the words that decontamination sees.

Words are folded, so letter case, accents and punctuation make no difference. The first document of a group is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from nemo_upcycle.data.engine.clean import write_numbers
from nemo_upcycle.data.engine.ledger import LedgerStep
from nemo_upcycle.data.word_hashes import grams_of, joined, normalise


_ROWS = 4096  # n-grams hashed at a time: 3.7 MB with 112 hashes each


class SignNear(MinhashDedupSignature):
    """Writes the signatures of documents; a document with fewer words than an n-gram has no signature."""

    def __init__(self, folder: str, config: MinhashConfig) -> None:
        # The language's own word tokenizer would need spaCy.
        super().__init__(folder, config, WhitespaceTokenizer())

    def get_shingles(self, text: str) -> np.ndarray:
        """Return the hashes of the n-grams of a text, one in each row."""
        size = self.config.n_grams
        return np.unique(joined(grams_of(normalise(text), size))).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Return the hashes of each band, computed in pieces to save memory."""
        pieces = np.array_split(shingles, -(-len(shingles) // _ROWS))
        return np.min(list(map(super().get_signature, pieces)), axis=0).tolist()


class KeepFirst(LedgerStep):
    """Writes which documents are near duplicates of an earlier document, directly or through others.

    datatrove's own step keeps the document that has the most pairs. So it might keep a training document and remove a
    held-out document.
    """

    type, name = "dedup", "all but the first of near duplicates"

    def __init__(self, ledger: Any, folder: Path) -> None:
        super().__init__(ledger)
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Join the pairs of all bands into groups."""
        earlier: dict[int, int] = {}  # document -> an earlier document of its group

        def first(document: int) -> int:
            while (before := earlier.get(document, document)) != document:
                earlier[document] = earlier.get(before, before)
                document = before
            return document

        for pair in self._pairs():
            one, other = sorted(map(first, pair))
            if one != other:
                earlier[other] = one
        documents = np.array(sorted(earlier), np.uint64)
        tasks = documents >> np.uint64(32)
        for task in np.unique(tasks).tolist():
            numbers = documents[tasks == task] & np.uint64(0xFFFFFFFF)
            write_numbers(self.folder / "near" / f"{task:05d}.remove", numbers)

    def _pairs(self) -> Iterator[list[int]]:
        """Yield pairs of documents, each encoded as its task (high 32 bits) and its number (low 32 bits)."""
        for path in sorted((self.folder / "near_pairs").glob("*.dups")):
            quadruples = np.fromfile(path, "<u4").reshape(-1, 4).astype(np.uint64)
            pairs = (quadruples[:, ::2] << np.uint64(32)) | quadruples[:, 1::2]
            for at in range(0, len(pairs), _ROWS):
                yield from pairs[at : at + _ROWS].tolist()
