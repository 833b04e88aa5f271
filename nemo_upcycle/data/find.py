"""Find the documents of a blend that contain a text, and the samples and steps of a training that read them.

Documents are searched in the training split. Their numbers count from 0 over all files of a source, in the order of
`EpochDataset`. The samples come from Megatron's own dataset, which is built in memory as the training builds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_upcycle.data.finished import TOKENIZER, FinishedBlend
from nemo_upcycle.data.indexed_dataset import read_documents
from nemo_upcycle.data.skipped_samples import SkippedSamples
from nemo_upcycle.utils.progress import track


_NONE_SKIPPED = SkippedSamples()
#: Tokens that are searched at once, and digits of a number that is no document's.
_CHUNK_TOKENS, _MOST_DIGITS = 1 << 20, 19


@dataclass(frozen=True)
class Documents:
    """Neighbouring documents of a source.

    Attributes:
        source: name of the source.
        first: number of the first document.
        last: number of the last document.
        tokens: number of their tokens.
    """

    source: str
    first: int
    last: int
    tokens: int


@dataclass(frozen=True)
class Reading:
    """How a training reads a blend.

    Args:
        seq_length: sequence length (tokens).
        seed: seed of the order of the samples.
        samples: number of samples that the training reads.
        batch: samples in a step, over all ranks; the same in all steps.
        skipped: samples that the training leaves out. The samples at the start of the order that NeMo's
            `skip_samples` leaves out are a range like any other.
    """

    seq_length: int
    seed: int
    samples: int
    batch: int = 1
    skipped: SkippedSamples = _NONE_SKIPPED


@dataclass(frozen=True)
class Read:
    """Where a training reads documents.

    Attributes:
        documents: the documents.
        samples: numbers of the samples with a token of the documents, sorted, in the order of the data, from 0.
        steps: numbers of the steps that read these samples, sorted, from 1.
    """

    documents: Documents
    samples: NDArray[np.int64]
    steps: NDArray[np.int64]


def find_documents(blend: FinishedBlend, value: str) -> Iterator[Documents]:
    """Yield the documents that a value names; nothing if there are none.

    Args:
        blend: finished data folder.
        value: name of a source, SOURCE:NUMBER, or a text, which is searched in all documents.

    Example:
        >>> list(find_documents(open_blend("data/mine"), "books:17"))  # doctest: +SKIP
        [Documents(source='books', first=17, last=17, tokens=812)]
    """
    sources = blend.tokens["train"]
    name, _, number = value.rpartition(":")
    if value in sources:
        yield Documents(value, 0, sum(map(len, _lengths(blend, value))) - 1, sum(sources[value].values()))
    elif name in sources and number.isdecimal() and len(number) < _MOST_DIGITS:
        lengths = np.concatenate(_lengths(blend, name))
        if int(number) < len(lengths):
            yield Documents(name, int(number), int(number), int(lengths[int(number)]))
    else:
        yield from _find_text(blend, value)


def count_documents(blend: FinishedBlend) -> int:
    """Count the training documents of all sources."""
    return sum(len(lengths) for source in blend.tokens["train"] for lengths in _lengths(blend, source))


def find_samples(blend: FinishedBlend, found: Sequence[Documents], reading: Reading) -> list[Read]:
    """Return the samples and steps that read documents, in every epoch.

    The function builds Megatron's own dataset in memory, as the training builds it. It lists each sample in which the
    model reads or predicts at least one token of a document.

    Args:
        blend: finished data folder.
        found: documents.
        reading: how the training reads the blend.

    Raises:
        UpcycleError: a source is shorter than a sequence.
    """
    order = _Order(blend, reading)
    samples: dict[Documents, NDArray[np.int64]] = {}
    for source in dict.fromkeys(documents.source for documents in found):
        of_source = [documents for documents in found if documents.source == source]
        samples |= zip(of_source, order.samples_of(source, of_source), strict=True)
    return [_as_read(documents, samples[documents], reading) for documents in found]


def ranges_of(numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Join sorted numbers into ranges, each with its first and last number.

    Example:
        >>> ranges_of(np.array([3, 4, 5, 9]))
        [(3, 5), (9, 9)]
    """
    if not len(numbers):
        return []
    ends = np.flatnonzero(np.diff(numbers) > 1)
    firsts, lasts = numbers[[0, *(ends + 1)]], numbers[[*ends, -1]]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _as_read(documents: Documents, samples: NDArray[np.int64], reading: Reading) -> Read:
    """Omit the samples that the training does not read, and add the steps that read the others."""
    places = samples
    if reading.skipped.ranges:
        found = map(reading.skipped.place_of, samples.tolist())
        places = np.array([reading.samples if place is None else place for place in found], np.int64)
    is_read = places < reading.samples
    return Read(documents, samples[is_read], np.unique(places[is_read] // reading.batch + 1))


class _Order:
    """The order of a blend's samples in a training.

    Args:
        blend: finished data folder.
        reading: how the training reads the blend.
    """

    def __init__(self, blend: FinishedBlend, reading: Reading) -> None:
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

        from nemo_upcycle.data.epoch_dataset import EpochDataset, dataset_config

        config = dataset_config(
            blend.paths(reading.seq_length)["train"],
            None,
            seq_length=reading.seq_length,
            seed=reading.seed,
            tokenizer=NullTokenizer(blend.manifest["tokenizer"]["vocab_size"]),  # the order does not depend on it
            cache=None,
        )
        wanted = [reading.samples + reading.skipped.count, None, None]
        train = BlendedMegatronDatasetBuilder(EpochDataset, wanted, lambda: True, config).build()[0]
        self._blended = None if isinstance(train, EpochDataset) else train
        datasets = train.datasets if self._blended else [train]
        self._datasets = {Path(dataset.dataset_path).name: (n, dataset) for n, dataset in enumerate(datasets)}
        self._first = {source: Path(min(prefixes)).name for source, prefixes in blend.tokens["train"].items()}

    def samples_of(self, source: str, wanted: Sequence[Documents]) -> list[NDArray[np.int64]]:
        """Return the sorted samples that contain a token of each of the wanted documents of a source."""
        number, dataset = self._datasets[self._first[source]]
        place_in_blend = self._places(number, len(dataset))
        place_in_source = np.empty(len(dataset), np.int64)
        place_in_source[dataset.shuffle_index] = np.arange(len(dataset))
        # Sample n has tokens of the entries starts[n] to ends[n] of the documents' order, both included.
        bounds = dataset.sample_index[:, 0].astype(np.int64)
        starts, ends = bounds[:-1], bounds[1:]

        def samples(entries: NDArray[np.int64]) -> NDArray[np.int64]:
            entries = np.sort(entries)
            firsts, afters = np.searchsorted(ends, entries, "left"), np.searchsorted(starts, entries, "right")
            firsts[1:] = np.maximum(firsts[1:], afters[:-1])  # neighbouring entries may share a sample
            found = place_in_blend[place_in_source[_numbers_in(firsts, afters)]]
            return np.sort(found[found >= 0])

        is_wanted = np.zeros(len(dataset.indices), bool)
        for one in wanted:
            is_wanted[one.first : one.last + 1] = True
        entries = np.flatnonzero(is_wanted[dataset.document_index])
        documents = dataset.document_index[entries]
        by_document = np.argsort(documents, kind="stable")
        entries, documents = entries[by_document], documents[by_document]
        parts = [np.searchsorted(documents, (one.first, one.last + 1)) for one in wanted]
        return [samples(entries[first:after]) for first, after in parts]

    def _places(self, number: int, length: int) -> NDArray[np.int64]:
        """Return the place of each sample of a source in the blend; -1 if the training does not read the sample."""
        if self._blended is None:
            return np.arange(length)
        of_source = np.flatnonzero(self._blended.dataset_index == number)
        places = np.full(length, -1)
        places[self._blended.dataset_sample_index[of_source]] = of_source
        return places


def _numbers_in(firsts: NDArray[np.int64], afters: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of all ranges; a range may be empty."""
    counts = np.maximum(afters - firsts, 0)
    skipped = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(firsts, counts) + np.arange(counts.sum()) - skipped


def _lengths(blend: FinishedBlend, source: str) -> list[NDArray[np.int32]]:
    """Return the lengths of the training documents in each file of a source (tokens)."""
    return [read_documents(blend.folder / prefix)[0] for prefix in sorted(blend.tokens["train"][source])]


def documents_with(
    text: str, tokenizer: Any, end: int, lengths: NDArray[np.int32], ids: NDArray[Any]
) -> Iterator[int]:
    """Yield the numbers of the documents that contain a text, as typed or as the tokenizer normalises it.

    Args:
        text: text to search.
        tokenizer: tokenizer of the library `tokenizers` that made the tokens; it decodes on all cores.
        end: id of the token that ends a document.
        lengths: lengths of the documents (tokens).
        ids: tokens of all documents in a row.
    """
    if text != text.encode("utf-8", "replace").decode():
        return  # an argument of a command that is not UTF-8
    spellings = {text, tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text}
    documents = [one[:-1] if one[-1:] == end else one for one in np.split(ids, np.cumsum(lengths)[:-1])]
    decoded = tokenizer.decode_batch([one.tolist() for one in documents], skip_special_tokens=False)
    yield from (number for number, one in enumerate(decoded) if any(spelling in one for spelling in spellings))


def _find_text(blend: FinishedBlend, text: str) -> Iterator[Documents]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(blend.folder / TOKENIZER / "tokenizer.json"))
    end = blend.manifest["tokenizer"]["eos_id"]
    total = sum(-(-tokens // _CHUNK_TOKENS) for files in blend.tokens["train"].values() for tokens in files.values())
    chunks = track(_chunks(blend), "search", total)
    for source, first, lengths, ids in chunks:
        for number in documents_with(text, tokenizer, end, lengths, ids):
            yield Documents(source, first + number, first + number, int(lengths[number]))


def _chunks(blend: FinishedBlend) -> Iterator[tuple[str, int, NDArray[np.int32], NDArray[Any]]]:
    """Yield whole documents: source, number of the first document, lengths of the documents, and all their tokens."""
    for source, prefixes in blend.tokens["train"].items():
        before = 0
        for prefix in sorted(prefixes):
            lengths, ids = read_documents(blend.folder / prefix)
            ends = np.cumsum(lengths, dtype=np.int64)
            first = 0
            while first < len(lengths):
                start = int(ends[first - 1]) if first else 0
                after = max(first + 1, int(np.searchsorted(ends, start + _CHUNK_TOKENS, "right")))
                yield source, before + first, lengths[first:after], ids[start : int(ends[after - 1])]
                first = after
            before += len(lengths)
