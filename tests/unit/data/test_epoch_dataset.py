"""A run of any length reads a source in epochs: every token is read once before any token is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest


SEQUENCE = 16


def _write(folder: Path, *files: list[int]) -> str:
    """Write a source with documents of these lengths and tokens 0, 1, 2, ...; return the first file's prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    first = 0
    for number, lengths in enumerate(files):
        prefix = folder / f"talks_train_{number:02d}_text_document"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
        for length in lengths:
            builder.add_document(list(range(first, first + length)), [length])
            first += length
        builder.finalize(f"{prefix}.idx")
    return str(folder / "talks_train_00_text_document")


def _open(prefix: str, num_samples: int | None, *, is_stock: bool = False, seed: int = 1234) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    from nemo_upcycle.data.epoch_dataset import EpochDataset

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=SEQUENCE,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(Path(prefix).parent / "indices"),
        tokenizer=NullTokenizer(1 << 20),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    kind = GPTDataset if is_stock else EpochDataset
    documents = kind.build_low_level_dataset(prefix, config)
    numbers = numpy.arange(len(documents.sequence_lengths), dtype=numpy.int32)
    return kind(documents, prefix, numbers, num_samples, Split.train, config)


def _tokens(dataset: Any) -> numpy.ndarray:
    """Return the tokens of all samples in the order in which a model reads them."""
    samples = [dataset[number] for number in range(len(dataset))]
    for sample in samples:
        assert (sample["labels"][:-1] == sample["tokens"][1:]).all()
    return numpy.concatenate([sample["tokens"].numpy() for sample in samples])


def _lengths(documents: int, seed: int = 0) -> list[int]:
    return numpy.random.RandomState(seed).randint(1, 50, documents).tolist()


def _require_epochs(read: numpy.ndarray, tokens: int, epochs: int) -> None:
    """Check that each whole epoch reads every token once, and that the incomplete last epoch repeats no token."""
    whole = read[: epochs * tokens].reshape(epochs, tokens)
    assert (numpy.sort(whole, axis=1) == numpy.arange(tokens)).all()
    rest = read[epochs * tokens :]
    assert len(set(rest)) == len(rest)


@pytest.mark.parametrize("files", [[40], [40, 3, 25], [40, 0, 25]], ids=["one file", "three files", "an empty file"])
def test_one_epoch_of_five_reads_every_token_once(tmp_path: Path, files: list[int]) -> None:
    lengths = [_lengths(documents, seed) for seed, documents in enumerate(files)]
    tokens = sum(map(sum, lengths))
    dataset = _open(_write(tmp_path, *lengths), 4 * tokens // SEQUENCE + 1)
    read = _tokens(dataset)
    assert 5 * tokens - SEQUENCE <= len(read) < 5 * tokens
    _require_epochs(read, tokens, 4)
    epochs = read[: 4 * tokens].reshape(4, tokens)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_first_epoch_is_in_the_order_of_megatron(tmp_path: Path) -> None:
    prefix = _write(tmp_path, _lengths(40))
    assert (_tokens(_open(prefix, 3)) == _tokens(_open(prefix, 3, is_stock=True))).all()


def test_seeds_have_no_epoch_in_common(tmp_path: Path) -> None:
    lengths = _lengths(40)
    prefix, tokens = _write(tmp_path, lengths), sum(lengths)
    reads = [_tokens(_open(prefix, 2 * tokens // SEQUENCE + 1, seed=seed))[: 2 * tokens] for seed in (1234, 1235)]
    epochs = [tuple(epoch) for read in reads for epoch in read.reshape(2, tokens)]
    assert len(set(epochs)) == 4


@pytest.mark.parametrize("lengths", [[SEQUENCE + 1], [9, 8], [7, 30], [1] * 33, [2 * SEQUENCE]])
def test_tiny_source_is_read_for_many_epochs(tmp_path: Path, lengths: list[int]) -> None:
    """Every sample, or every second sample, reaches into the next epoch."""
    tokens, epochs = sum(lengths), 500
    dataset = _open(_write(tmp_path, lengths), epochs * tokens // SEQUENCE + 1)
    _require_epochs(_tokens(dataset), tokens, epochs)
    # A last sample does not count if its last target is missing.
    assert sorted(dataset.shuffle_index) == list(range(len(dataset)))


def test_runs_of_equal_length_share_memory_mapped_indices(tmp_path: Path) -> None:
    lengths = _lengths(40)
    prefix, once = _write(tmp_path, lengths), sum(lengths) // SEQUENCE
    cache = tmp_path / "indices"
    for num_samples, files in ((3, 3), (once // 2, 3), (None, 3), (once + 5, 6), (2 * once - 5, 6)):
        dataset = _open(prefix, num_samples)
        assert len(list(cache.iterdir())) == files
    for index in (dataset.document_index, dataset.sample_index, dataset.shuffle_index):
        assert isinstance(index, numpy.memmap)
