"""Joining datasets gives the same bytes as Megatron's own builder."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from nemo_upcycle.data.indexed_dataset import join_datasets


def _write(prefix: Path, documents: list[list[int]], vocabulary: int) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocabulary))
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [49152, 128256], ids=["uint16", "int32"])
def test_joined_datasets_have_the_bytes_of_megatrons_builder(tmp_path: Path, vocabulary: int) -> None:
    texts = [[[1, 2, 3], [4]], [[5, 6]], [[7], [8, 9, 10, 11], [vocabulary - 1]]]
    pieces = [_write(tmp_path / str(number), documents, vocabulary) for number, documents in enumerate(texts)]
    join_datasets(pieces, tmp_path / "ours")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocabulary))
    for piece in pieces:
        builder.add_index(str(piece))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [list(read[number]) for number in range(len(read))] == [text for documents in texts for text in documents]
