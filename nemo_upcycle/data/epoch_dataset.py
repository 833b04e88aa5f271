"""Megatron's `GPTDataset`, read epoch by epoch: for NeMo and Megatron-Bridge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import get_blend_from_list

from nemo_upcycle.data.indexed_dataset import tokens_of


class EpochDataset(GPTDataset):
    """The samples of one source; every token is read once before any token is read again.

    `GPTDataset` shuffles all epochs of a run together. Documents and samples of the fifth epoch may come before
    documents and samples of the first epoch, and a longer run has another order. `EpochDataset` shuffles the documents
    and the samples of each epoch separately.

    As in `GPTDataset`, the epochs are one stream of tokens that is cut into samples. So the last tokens of an epoch
    and the first tokens of the next epoch share a sample, which is the last sample of the earlier epoch. No token is
    dropped, more epochs only append to the order, and the first epoch has the order of `GPTDataset`.

    Args:
        dataset: dataset from `build_low_level_dataset`.
        dataset_path: prefix of the source's first file.
        indexed_indices: numbers of the source's documents.
        num_samples: minimum number of samples; None for one epoch.
        index_split: split of the samples.
        config: Megatron's configuration of the dataset.

    Example:
        >>> BlendedMegatronDatasetBuilder(EpochDataset, [1000, 8, None], lambda: True, config)  # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: Any,
        dataset_path: str,
        indexed_indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Any,
        config: Any,
    ) -> None:
        self._tokens = sum(tokens_of(file) for file in _files_of(dataset_path))
        self._epochs = -(-((num_samples or 0) * config.sequence_length + 1) // self._tokens)
        # The names of index files contain the number of samples. This number is rounded up to whole epochs, so that
        # runs with equally many epochs share the files.
        whole_epochs = (self._epochs * self._tokens - 1) // config.sequence_length
        super().__init__(dataset, dataset_path, indexed_indices, whole_epochs, index_split, config)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
        """Return the documents of all files of a source."""
        datasets = [IndexedDataset(str(file), mmap=config.mmap_bin_files) for file in _files_of(dataset_path)]
        return datasets[0] if len(datasets) == 1 else _JoinedDatasets(datasets)

    def _build_document_sample_shuffle_indices(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Return the indices of `GPTDataset`, memory-mapped; the first rank builds missing indices.

        Without a cache folder, the indices stay in memory.
        """
        if self.config.path_to_cache is None:
            return self._order()
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        names = ("document_index", "sample_index", "shuffle_index")
        files = [Path(self.config.path_to_cache, f"{base}-{name}.npy") for name in names]
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if first and not all(file.is_file() for file in files):
            files[0].parent.mkdir(parents=True, exist_ok=True)
            for file, index in zip(files, self._order(), strict=True):
                numpy.save(file, index)
        documents, samples, shuffled = (numpy.load(file, mmap_mode="r") for file in files)
        return documents, samples, shuffled

    def _order(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        from megatron.core.datasets.helpers import build_sample_idx  # compiled, and needed only to build indices

        length = self.config.sequence_length
        random = numpy.random.RandomState(self.config.random_seed)
        documents = numpy.tile(self.indices, (self._epochs, 1))
        shuffled = numpy.arange(self.num_samples, dtype=numpy.uint32 if self.num_samples < 1 << 32 else numpy.int64)
        start = 0
        for epoch in range(self._epochs):
            crossing = ((epoch + 1) * self._tokens - 1) // length  # the sample that crosses into the next epoch
            random.shuffle(documents[epoch])
            random.shuffle(shuffled[start:crossing])
            start = crossing + 1
        order = documents.reshape(-1)
        samples = build_sample_idx(
            numpy.array(self.dataset.sequence_lengths), order, length, self._epochs, self._tokens
        )
        return order, samples, shuffled


def dataset_config(
    train: list[str], validation: list[str] | None, *, seq_length: int, seed: int, tokenizer: Any, cache: Path | None
) -> GPTDatasetConfig:
    """Return Megatron's configuration of a blend's datasets.

    Args:
        train: weights and prefixes of the training split, from `FinishedBlend.paths`.
        validation: weights and prefixes of the validation split; None omits the split.
        seq_length: sequence length (tokens).
        seed: seed of the order of the samples.
        tokenizer: Megatron's tokenizer.
        cache: folder of the index files; None keeps the indices in memory.
    """
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[get_blend_from_list(train), get_blend_from_list(validation), None],
        path_to_cache=None if cache is None else str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # attention is causal
    )


class _JoinedDatasets:
    """The documents of several indexed datasets, one after the other, with the interface that `GPTDataset` uses."""

    def __init__(self, datasets: list[Any]) -> None:
        self._datasets = datasets
        self._ends = numpy.cumsum([len(dataset) for dataset in datasets])
        self.sequence_lengths = numpy.concatenate([dataset.sequence_lengths for dataset in datasets])

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        number = int(numpy.searchsorted(self._ends, idx, side="right"))
        within = int(idx) - (int(self._ends[number - 1]) if number else 0)
        return self._datasets[number].get(within, offset=offset, length=length)


def _files_of(first: str) -> list[Path]:
    """Return the prefixes of a source's files with tokens, given the prefix of the first file."""
    path = Path(first)
    pattern = re.sub(r"_\d\d_text_document$", "_[0-9][0-9]_text_document.idx", path.name)
    return [file.with_suffix("") for file in sorted(path.parent.glob(pattern)) if tokens_of(file.with_suffix(""))]
